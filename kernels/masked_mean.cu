#include "kernels/masked_mean.h"

#include <cmath>

#include "kernels/device/reduce.h"
#include "kernels/device/rows.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 16 * kThreads;  // of one block

struct Term {
  float value, slope;
};
struct Entropy {
  static DEVICE_FN Term of(float p) {
    if (!(p > 0)) return {0.0f, 0.0f};
    const float log_p = logf(p);
    return {-p * log_p, -(log_p + 1.0f)};
  }
};
struct Itself {
  static DEVICE_FN Term of(float x) { return {x, 1.0f}; }
};

struct Rows {
  const uint8_t* mask;
  int rows, choices;
  DEVICE_FN bool count(int row) const { return mask == nullptr || mask[row / choices] != 0; }
};

// counted = how many rows count; one block.
__global__ void __launch_bounds__(kThreads) count_rows_kernel(const Rows rows, int* counted) {
  auto& scratch = shared_memory<BlockScratch<int>>();
  int sum = 0;
  for (int r = static_cast<int>(threadIdx.x); r < rows.rows; r += kThreads) sum += rows.count(r) ? 1 : 0;
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *counted = sum;
}

// Of one layer: partial[blockIdx.x] = the block's share of the loss, and its gradient where it is wanted. share: of an element, times the
// number of counted rows.
template <class F, class T>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const T* x, const Rows rows, const int* counted, double* partial, T* dx, int total, int columns,
                double share, double scale) {
  auto& scratch = shared_memory<BlockScratch<double>>();
  const double part = share / std::max(1, *counted);
  const int begin = static_cast<int>(blockIdx.x) * kElements, end = std::min(begin + kElements, total);
  double sum = 0;
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    const bool counts = rows.count(i / columns);
    const Term term = counts ? F::of(to_float(x[i])) : Term{0.0f, 0.0f};
    sum += static_cast<double>(term.value);
    if (dx != nullptr) dx[i] = from_float<T>(static_cast<float>(scale * part * static_cast<double>(term.slope)));
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = part * sum;
}

// loss = the sum of the parts; one block.
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const double* partial, double* loss, int64_t parts) {
  auto& scratch = shared_memory<BlockScratch<double>>();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < parts; i += kThreads) sum += partial[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *loss = sum;
}

// share(columns): see mean_kernel.
template <class F, class Share>
void mean(const std::vector<Tensor>& x, const Tensor& mask, double scale, const Tensor& loss,
          const std::vector<Tensor>& dx, const Share& share) {
  const MemoryScope scratch(MemoryCategory::kScratch);
  const int64_t tokens = mask.defined() ? std::max<int64_t>(1, mask.numel()) : x[0].dim(0);
  const Rows rows{.mask = mask.defined() ? mask.data<uint8_t>() : nullptr,
                  .rows = static_cast<int>(x[0].dim(0)),
                  .choices = static_cast<int>(x[0].dim(0) / std::max<int64_t>(1, tokens))};
  int64_t parts = 0;
  for (const Tensor& t : x) {
    require(t.numel() < int64_t{1} << 31, "masked_mean: {} elements in one layer", t.numel());
    parts += ceil_div(t.numel(), int64_t{kElements});
  }
  const Tensor counted = Tensor::empty({1}, DType::kI32, kDevice),
               partial = Tensor::empty({parts}, DType::kF64, kDevice);
  launch<count_rows_kernel>({.blocks = {1}, .threads = {kThreads}, .shared_bytes = sizeof(BlockScratch<int>)}, rows,
                            counted.data<int32_t>());
  int64_t first = 0;
  for (size_t l = 0; l < x.size(); ++l) {
    const int64_t blocks = ceil_div(x[l].numel(), int64_t{kElements});
    const bool gradient = !dx.empty() && dx[l].defined();
    visit_device_floating("masked_mean", x[l].dtype(), [&]<class T>() {
      launch<mean_kernel<F, T>>(
          {.blocks = {uint32_t(blocks)}, .threads = {kThreads}, .shared_bytes = sizeof(BlockScratch<double>)},
          x[l].data<T>(), rows, counted.data<int32_t>(), partial.data<double>() + first,
          gradient ? dx[l].data<T>() : nullptr, static_cast<int>(x[l].numel()), static_cast<int>(x[l].dim(1)),
          share(x[l].dim(1)), scale);
    });
    first += blocks;
  }
  launch<add_parts_kernel>({.blocks = {1}, .threads = {kThreads}, .shared_bytes = sizeof(BlockScratch<double>)},
                           partial.data<double>(), loss.data<double>(), parts);
}

void entropy_device(const RouterEntropy& op) {
  const auto layers = static_cast<double>(op.probs.size());
  mean<Entropy>(op.probs, op.mask, op.scale, op.loss, op.dprobs, [layers](int64_t) { return 1 / layers; });
}
void mean_device(const MaskedMean& op) {
  const auto layers = static_cast<double>(op.x.size());
  mean<Itself>(op.x, op.mask, op.scale, op.loss, op.dx,
               [layers](int64_t columns) { return 1 / (static_cast<double>(columns) * layers); });
}

const RegisterKernel<RouterEntropy> register_entropy{kDevice, &entropy_device};
const RegisterKernel<MaskedMean> register_mean{kDevice, &mean_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
