#include "kernels/rope.h"

#include <cmath>
#include <vector>

#include "kernels/access.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kGrainElements = 16384;

template <class T> void rotate(const Rope& op) {
  using C = compute_t<T>;
  const int64_t rows = op.x.dim(0), width = op.x.dim(1), half = op.head_dim / 2;
  const int32_t* positions = op.positions.data<int32_t>();
  const T* x = op.x.data<T>();
  T* y = op.y.data<T>();
  std::vector<double> frequency(static_cast<size_t>(half));
  for (int64_t i = 0; i < half; ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(op.head_dim);
    frequency[static_cast<size_t>(i)] = std::pow(op.theta, exponent);
  }
  const double direction = op.inverse ? -1 : 1;
  parallel_for(0, rows, kGrainElements / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<C> cosine(frequency.size()), sine(frequency.size());
    for (int64_t t = begin; t < end; ++t) {
      for (size_t i = 0; i < frequency.size(); ++i) {
        const double angle = positions[t] * frequency[i];
        cosine[i] = static_cast<C>(std::cos(angle));
        sine[i] = static_cast<C>(direction * std::sin(angle));
      }
      for (int64_t head = t * width; head < (t + 1) * width; head += op.head_dim) {
        const T *low = x + head, *high = low + half;
        T *out_low = y + head, *out_high = out_low + half;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          const C a = load(low, i), b = load(high, i);
          const C c = cosine[static_cast<size_t>(i)], s = sine[static_cast<size_t>(i)];
          store(out_low, i, a * c - b * s);
          store(out_high, i, b * c + a * s);
        }
      }
    }
  });
}

void rotate_cpu(const Rope& op) {
  visit_floating("rope", op.x.dtype(), [&]<class T>() { rotate<T>(op); });
}
const RegisterKernel<Rope> register_rope{DeviceKind::kCpu, &rotate_cpu};

}  // namespace

void run(const Rope& op) {
  require(op.head_dim > 0 && op.head_dim % 2 == 0, "rope: head_dim is {}, expected an even number", op.head_dim);
  require(op.x.rank() == 2 && op.x.dim(1) % op.head_dim == 0, "rope: x is {}, expected [T, H*{}]", op.x.shape().str(),
          op.head_dim);
  require_tensor(op.positions, "rope", "positions", {op.x.dim(0)}, DType::kI32);
  require_tensor(op.y, "rope", "y", op.x.shape(), op.x.dtype());
  dispatch(op, op.x.device(), "rope");
}

}  // namespace lightmoe
