#include "kernels/adamw.h"

#include <cmath>

#include "kernels/device/reduce.h"
#include "kernels/device/rows.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 256;
constexpr int kParts = 64;  // tensors of one launch: their list is a kernel argument, at most 4 KB
constexpr int kSteps = 4;   // vectors a thread takes

// Tensors of one launch, and the first block of each.
template <class Part>
struct PartList {
  Part part[kParts];
  uint32_t first_block[kParts + 1] = {};
  int count = 0;
  uint32_t blocks() const { return first_block[count]; }
  void add(const Part& added, int64_t blocks) {
    part[count] = added;
    first_block[count + 1] = first_block[count] + static_cast<uint32_t>(blocks);
    ++count;
  }
  DEVICE_FN int part_of(uint32_t block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_block[middle] <= block ? low : high) = middle;
    }
    return low;
  }
};

// Launches lists of at most kParts tensors: add for each tensor, flush at the end.
template <class Part, class Launch>
class Batches {
 public:
  explicit Batches(Launch launch) : launch_(launch) {}
  void add(const Part& part, int64_t blocks) {
    list_.add(part, blocks);
    if (list_.count == kParts) flush();
  }
  void flush() {
    if (list_.count > 0) launch_(list_);
    list_ = {};
  }

 private:
  Launch launch_;
  PartList<Part> list_;
};

struct Update {
  void* w;
  const void* grad;
  float *m, *v;
  int64_t count;
  float keep, rate;
  bool aligned;
};
struct Moments {
  float beta1, beta2, rest1, rest2, grad_scale, root_correction, eps;
};
static_assert(sizeof(PartList<Update>) + sizeof(Moments) <= 4096);

template <class W, class G>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ PartList<Update> list, const Moments o) {
  constexpr int kV = kVector<W>;
  const int index = list.part_of(blockIdx.x);
  const Update& part = list.part[index];
  W* w = static_cast<W*>(part.w);
  const G* grad = static_cast<const G*>(part.grad);
  const bool aligned = part.aligned;
  const int64_t begin =
      (static_cast<int64_t>(blockIdx.x - list.first_block[index]) * kSteps * kThreads + threadIdx.x) * kV;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t i = begin + step * kThreads * kV;
    if (i >= part.count) return;
    auto weight = load_floats<kV>(w, i, part.count, aligned);
    auto mean = load_floats<kV>(part.m, i, part.count, aligned),
         square = load_floats<kV>(part.v, i, part.count, aligned);
    const auto gradient = load_floats<kV>(grad, i, part.count, aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k) {
      const float g = o.grad_scale * gradient[k];
      mean[k] = o.beta1 * mean[k] + o.rest1 * g;
      square[k] = o.beta2 * square[k] + o.rest2 * g * g;
      weight[k] = part.keep * weight[k] - part.rate * mean[k] / (std::sqrt(square[k]) * o.root_correction + o.eps);
    }
    store_floats(part.m, i, part.count, aligned, mean);
    store_floats(part.v, i, part.count, aligned, square);
    store_floats(w, i, part.count, aligned, weight);
  }
}

template <class W, class G>
void update_all(const AdamW& op) {
  const double step = static_cast<double>(op.step);
  const Moments moments{.beta1 = static_cast<float>(op.beta1),
                        .beta2 = static_cast<float>(op.beta2),
                        .rest1 = static_cast<float>(1 - op.beta1),
                        .rest2 = static_cast<float>(1 - op.beta2),
                        .grad_scale = static_cast<float>(op.grad_scale),
                        .root_correction = static_cast<float>(1 / std::sqrt(1 - std::pow(op.beta2, step))),
                        .eps = static_cast<float>(op.eps)};
  const auto start = [&](const PartList<Update>& list) {
    launch<adamw_kernel<W, G>>({.blocks = {list.blocks()}, .threads = {kThreads}}, list, moments);
  };
  Batches<Update, decltype(start)> batches(start);
  for (const AdamWTensor& t : op.tensors) {
    if (t.w.dtype() != dtype_of<W> || t.grad.dtype() != dtype_of<G> || t.w.numel() == 0) continue;
    batches.add({.w = t.w.data<W>(),
                 .grad = t.grad.data<G>(),
                 .m = t.m.data<float>(),
                 .v = t.v.data<float>(),
                 .count = t.w.numel(),
                 .keep = static_cast<float>(1 - t.lr * t.weight_decay),
                 .rate = static_cast<float>(t.lr / (1 - std::pow(op.beta1, step))),
                 .aligned = aligned_rows(0, t.w.data<W>(), t.grad.data<G>(), t.m.data<float>(), t.v.data<float>())},
                ceil_div(t.w.numel(), int64_t{kThreads} * kSteps * kVector<W>));
  }
  batches.flush();
}

void adamw_device(const AdamW& op) {
  for (const AdamWTensor& t : op.tensors) {
    if (t.w.dtype() != DType::kF32 && t.w.dtype() != DType::kBF16) unsupported_dtype("adamw", t.w.dtype());
  }
  update_all<float, float>(op);
  update_all<bf16, bf16>(op);
  update_all<bf16, float>(op);
}
const RegisterKernel<AdamW> register_adamw{kDevice, &adamw_device};

struct Squares {
  const void* values;
  int64_t count;
  bool aligned;
};
constexpr int kSquareSteps = 16;

// partial[block] = sum of the squares of the block's piece.
template <class T>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ PartList<Squares> list, double* partial) {
  constexpr int kV = kVector<T>;
  auto& scratch = shared_memory<BlockScratch<double>>();
  const int index = list.part_of(blockIdx.x);
  const T* values = static_cast<const T*>(list.part[index].values);
  const int64_t count = list.part[index].count;
  const bool aligned = list.part[index].aligned;
  int64_t i = (static_cast<int64_t>(blockIdx.x - list.first_block[index]) * kSquareSteps * kThreads + threadIdx.x) * kV;
  double sum = 0;
  for (int step = 0; step < kSquareSteps; ++step, i += kThreads * kV) {
    const auto v = load_floats<kV>(values, i, count, aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k) sum += static_cast<double>(v[k]) * static_cast<double>(v[k]);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) norm_kernel(const double* partial, double* norm, int64_t count) {
  auto& scratch = shared_memory<BlockScratch<double>>();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *norm = std::sqrt(sum);
}

int64_t square_blocks(const Tensor& t) {
  return t.defined() ? ceil_div(t.numel(), int64_t{kThreads} * kSquareSteps * (t.dtype() == DType::kF32 ? 4 : 8)) : 0;
}

template <class T>
void squares_of(const std::vector<Tensor>& gradients, double** partial) {
  const auto start = [&](const PartList<Squares>& list) {
    launch<squares_kernel<T>>(
        {.blocks = {list.blocks()}, .threads = {kThreads}, .shared_bytes = sizeof(BlockScratch<double>)}, list,
        *partial);
    *partial += list.blocks();
  };
  Batches<Squares, decltype(start)> batches(start);
  for (const Tensor& t : gradients) {
    if (t.defined() && t.dtype() == dtype_of<T> && t.numel() > 0)
      batches.add({.values = t.raw(), .count = t.numel(), .aligned = aligned_rows(0, t.data<T>())}, square_blocks(t));
  }
  batches.flush();
}

void gradient_norm_device(const GradientNorm& op) {
  int64_t blocks = 0;
  for (const Tensor& t : op.gradients) {
    if (t.defined() && t.dtype() != DType::kF32 && t.dtype() != DType::kBF16)
      unsupported_dtype("gradient_norm", t.dtype());
    blocks += square_blocks(t);
  }
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor partial = Tensor::empty({blocks}, DType::kF64, kDevice);
  double* next = partial.data<double>();
  squares_of<float>(op.gradients, &next);
  squares_of<bf16>(op.gradients, &next);
  launch<norm_kernel>({.blocks = {1}, .threads = {kThreads}, .shared_bytes = sizeof(BlockScratch<double>)},
                      partial.data<double>(), op.norm.data<double>(), blocks);
}
const RegisterKernel<GradientNorm> register_norm{kDevice, &gradient_norm_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
