#include "kernels/contraction.h"

#include "kernels/access.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kGrainTerms = 1 << 14;

int64_t start_of(const StridedView& v, int64_t i, int64_t j) { return v.begin + i * v.stride[0] + j * v.stride[1]; }

template <class T>
void contract(const Contraction& op) {
  const T *a = op.a.tensor.data<T>(), *b = op.b.tensor.defined() ? op.b.tensor.data<T>() : nullptr;
  T* y = op.y.tensor.data<T>();
  const int64_t columns = op.shape[1], depth = op.shape[2];
  const int64_t grain = std::max<int64_t>(1, kGrainTerms / std::max<int64_t>(1, depth * op.terms));
  parallel_for(0, op.shape[0] * columns, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = at / columns, j = at % columns;
      const int64_t in_a = start_of(op.a, i, j), in_b = start_of(op.b, i, j), out = start_of(op.y, i, j);
      for (int64_t k = 0; k < depth; ++k) {
        double sum = 0;
        for (int64_t r = 0; r < op.terms; ++r) {
          const auto value = static_cast<double>(load(a, in_a + k * op.a.stride[2] + r * op.a.step));
          sum += b == nullptr ? value : value * static_cast<double>(load(b, in_b + k * op.b.stride[2] + r * op.b.step));
        }
        const int64_t to = out + k * op.y.stride[2];
        if (op.accumulate) sum += static_cast<double>(load(y, to));
        store(y, to, static_cast<compute_t<T>>(sum));
      }
    }
  });
}

void contraction_cpu(const Contraction& op) {
  visit_floating("contraction", op.y.tensor.dtype(), [&]<class T>() { contract<T>(op); });
}

const RegisterKernel<Contraction> register_cpu{DeviceKind::kCpu, &contraction_cpu};

void check_view(const Contraction& op, const StridedView& v, const char* what) {
  require(v.tensor.dtype() == op.y.tensor.dtype(), "contraction: {} is {}, y {}", what, name_of(v.tensor.dtype()),
          name_of(op.y.tensor.dtype()));
  int64_t last = v.begin + (op.terms - 1) * v.step;
  for (size_t d = 0; d < 3; ++d) {
    require(v.stride[d] >= 0 && v.step >= 0 && v.begin >= 0, "contraction: {} has a negative stride or start", what);
    last += (op.shape[d] - 1) * v.stride[d];
  }
  require(last < v.tensor.numel(), "contraction: {} ends at element {} of {}", what, last, v.tensor.numel());
}

}  // namespace

void run(const Contraction& op) {
  require(op.terms >= 0, "contraction: {} terms", op.terms);
  if (op.shape[0] * op.shape[1] * op.shape[2] == 0) return;
  if (op.terms > 0) check_view(op, op.a, "a");
  if (op.terms > 0 && op.b.tensor.defined()) check_view(op, op.b, "b");
  Contraction once = op;
  once.terms = 1;
  check_view(once, op.y, "y");
  dispatch(op, op.y.tensor.device(), "contraction");
}

Tensor elementwise_product(const Tensor& a, const Tensor& b) {
  require_tensor(b, "elementwise_product", "b", a.shape(), a.dtype());
  const Tensor y = Tensor::empty(a.shape(), a.dtype());
  run(Contraction{.shape = {1, 1, a.numel()}, .a = flat(a), .b = flat(b), .y = flat(y)});
  return y;
}

}  // namespace lightmoe
