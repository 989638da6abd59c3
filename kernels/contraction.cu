#include "kernels/contraction.h"

#include "kernels/device/numeric.h"
#include "kernels/device/reduce.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kManyTerms = 512;  // from here on a block shares an output's

struct View {
  int64_t stride[3], step, begin;
  DEVICE_FN int64_t at(int64_t i, int64_t j, int64_t k) const {
    return begin + i * stride[0] + j * stride[1] + k * stride[2];
  }
};
struct Sizes {
  int64_t columns, depth, outputs, terms;
  View a, b, y;
  bool accumulate;
};

// terms first, first + stride, .. of the output at these places
template <class T>
DEVICE_FN double sum_of_terms(const T* a, const T* b, const Sizes& n, int64_t in_a, int64_t in_b, int64_t first,
                              int64_t stride) {
  double sum = 0;
  for (int64_t r = first; r < n.terms; r += stride) {
    const double value = static_cast<double>(to_float(a[in_a + r * n.a.step]));
    sum += b == nullptr ? value : value * static_cast<double>(to_float(b[in_b + r * n.b.step]));
  }
  return sum;
}

template <class T>
DEVICE_FN void write(T* y, const Sizes& n, int64_t at, double sum) {
  if (n.accumulate) sum += static_cast<double>(to_float(y[at]));
  y[at] = from_float<T>(static_cast<float>(sum));
}

template <class T>
__global__ void __launch_bounds__(kThreads) contraction_kernel(const T* a, const T* b, T* y, const Sizes n) {
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (output >= n.outputs) return;
  const int64_t k = output % n.depth, j = output / n.depth % n.columns, i = output / n.depth / n.columns;
  write(y, n, n.y.at(i, j, k), sum_of_terms(a, b, n, n.a.at(i, j, k), n.b.at(i, j, k), 0, 1));
}

template <class T>
__global__ void __launch_bounds__(kThreads) long_contraction_kernel(const T* a, const T* b, T* y, const Sizes n) {
  auto& scratch = shared_memory<BlockScratch<double>>();
  const int64_t output = blockIdx.x;
  const int64_t k = output % n.depth, j = output / n.depth % n.columns, i = output / n.depth / n.columns;
  const double sum = block_sum(
      sum_of_terms(a, b, n, n.a.at(i, j, k), n.b.at(i, j, k), static_cast<int64_t>(threadIdx.x), int64_t{kThreads}),
      scratch);
  if (threadIdx.x == 0) write(y, n, n.y.at(i, j, k), sum);
}

View view_of(const StridedView& v) { return {{v.stride[0], v.stride[1], v.stride[2]}, v.step, v.begin}; }

void contraction_device(const Contraction& op) {
  visit_device_floating("contraction", op.y.tensor.dtype(), [&]<class T>() {
    const Sizes n{.columns = op.shape[1],
                  .depth = op.shape[2],
                  .outputs = op.shape[0] * op.shape[1] * op.shape[2],
                  .terms = op.terms,
                  .a = view_of(op.a),
                  .b = view_of(op.b),
                  .y = view_of(op.y),
                  .accumulate = op.accumulate};
    const T *a = op.a.tensor.data<T>(), *b = op.b.tensor.defined() ? op.b.tensor.data<T>() : nullptr;
    T* y = op.y.tensor.data<T>();
    if (op.terms < kManyTerms) {
      launch<contraction_kernel<T>>({.blocks = {uint32_t(ceil_div(n.outputs, kThreads))}, .threads = {kThreads}}, a, b,
                                    y, n);
    } else {
      launch<long_contraction_kernel<T>>(
          {.blocks = {uint32_t(n.outputs)}, .threads = {kThreads}, .shared_bytes = sizeof(BlockScratch<double>)}, a, b,
          y, n);
    }
  });
}

const RegisterKernel<Contraction> register_kernel{kDevice, &contraction_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
