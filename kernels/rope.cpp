#include "kernels/rope.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/access.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kGrainElements = 16384;

std::vector<double> frequencies(const Rope& op) {
  std::vector<double> frequency(static_cast<size_t>(op.head_dim / 2));
  for (size_t i = 0; i < frequency.size(); ++i) {
    frequency[i] = std::pow(op.theta, -2.0 * static_cast<double>(i) / static_cast<double>(op.head_dim));
  }
  return frequency;
}

// cos and sin of one position, head_dim / 2 of each.
template <class C>
void turn(int64_t position, const std::vector<double>& frequency, bool inverse, C* turns) {
  C *cosine = turns, *sine = turns + frequency.size();
  for (size_t i = 0; i < frequency.size(); ++i) {
    const double angle = static_cast<double>(position) * frequency[i];
    cosine[i] = static_cast<C>(std::cos(angle));
    sine[i] = static_cast<C>(inverse ? -std::sin(angle) : std::sin(angle));
  }
}

// Packed rows repeat their positions, and sines cost more than everything else: one row of turns for each position up to the
// largest. Empty where positions stand far out, as in decoding; then every row computes its own, with the same values.
template <class C>
std::vector<C> table_of_turns(const Rope& op, const std::vector<double>& frequency) {
  const int32_t* positions = op.positions.data<int32_t>();
  const int64_t rows = op.x.dim(0), count = rows == 0 ? 0 : *std::max_element(positions, positions + rows) + int64_t{1};
  if (count > rows) return {};
  std::vector<C> table(static_cast<size_t>(count * op.head_dim));
  parallel_for(0, count, 4096 / op.head_dim + 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) turn(p, frequency, op.inverse, table.data() + p * op.head_dim);
  });
  return table;
}

template <class T>
void rotate(const Rope& op) {
  using C = compute_t<T>;
  const int64_t rows = op.x.dim(0), width = op.x.dim(1), half = op.head_dim / 2;
  const int32_t* positions = op.positions.data<int32_t>();
  const T* x = op.x.data<T>();
  T* y = op.y.data<T>();
  const std::vector<double> frequency = frequencies(op);
  const std::vector<C> table = table_of_turns<C>(op, frequency);
  parallel_for(0, rows, kGrainElements / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<C> own(static_cast<size_t>(op.head_dim));
    for (int64_t t = begin; t < end; ++t) {
      if (table.empty()) turn(positions[t], frequency, op.inverse, own.data());
      const C* cosine = table.empty() ? own.data() : table.data() + positions[t] * op.head_dim;
      const C* sine = cosine + half;
      for (int64_t head = t * width; head < (t + 1) * width; head += op.head_dim) {
        const T *low = x + head, *high = low + half;
        T *out_low = y + head, *out_high = out_low + half;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          const C a = load(low, i), b = load(high, i);
          store(out_low, i, a * cosine[i] - b * sine[i]);
          store(out_high, i, b * cosine[i] + a * sine[i]);
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
  require(op.x.rank() == 2 && op.x.dim(1) % op.head_dim == 0, "rope: x is {}, expected [T, H*{}]", op.x.shape(),
          op.head_dim);
  require_tensor(op.positions, "rope", "positions", {op.x.dim(0)}, DType::kI32);
  require_tensor(op.y, "rope", "y", op.x.shape(), op.x.dtype());
  dispatch(op, op.x.device(), "rope");
}

}  // namespace lightmoe
