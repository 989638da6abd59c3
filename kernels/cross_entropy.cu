#include "kernels/cross_entropy.h"

#include <cmath>

#include "kernels/device/reduce.h"
#include "kernels/device/rows.h"
#include "kernels/labels.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = kMaxRowThreads;
constexpr int kV = kVector<float>;
constexpr int64_t kDefaultChunkBytes = 256 << 20;
constexpr int64_t kChunkRowsStep = 128;  // rows of a tile of a product

struct RowShared {
  BlockScratch<float> maxima;
  BlockScratch<double> sums;
  BlockScratch<uint64_t> best;
};

// NOTE: the host does not see the labels; one outside the vocabulary stops the kernel.
DEVICE_FN int checked(int label, int n) {
  if (label < 0 || label >= n) trap();
  return label;
}

DEVICE_FN Floats<kV> logits_at(const float* row, int i, int n, bool aligned) {
  auto v = load_floats<kV>(row, i, n, aligned);
#pragma unroll
  for (int k = 0; k < kV; ++k) v[k] = i + k < n ? v[k] : -INFINITY;
  return v;
}

struct RowSum {
  float largest;
  double sum;  // of exp(logit - largest)
};

// In one reading: a thread's sum is scaled down whenever it meets a larger logit. f32 within four logits, f64 across.
DEVICE_FN RowSum sum_of_exponentials(const float* row, int n, bool aligned, RowShared& shared) {
  float largest = -INFINITY;
  double sum = 0;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    const auto v = logits_at(row, i, n, aligned);
    const float here = std::max(std::max(v[0], v[1]), std::max(v[2], v[3]));
    if (here > largest) {
      sum *= static_cast<double>(fast_exp(largest - here));
      largest = here;
    }
    sum += static_cast<double>((fast_exp(v[0] - largest) + fast_exp(v[1] - largest)) +
                               (fast_exp(v[2] - largest) + fast_exp(v[3] - largest)));
  }
  const float top = block_max(largest, -INFINITY, shared.maxima);
  return {top, block_sum(sum * static_cast<double>(fast_exp(largest - top)), shared.sums)};
}

// losses[row], and where G's gradient is wanted scale * (softmax - onehot), which may overwrite the logits; 0 for ignored rows.
template <class G>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(const float* logits, const int* labels, double* losses,
                                                                 G* gradient, int n, double scale, bool aligned) {
  auto& shared = shared_memory<RowShared>();
  const float* row = logits + static_cast<int64_t>(blockIdx.x) * n;
  G* out = gradient + static_cast<int64_t>(blockIdx.x) * n;
  const bool ignored = labels[blockIdx.x] == kIgnoredLabel;
  const int label = ignored ? -1 : checked(labels[blockIdx.x], n);
  float top = 0, factor = 0;
  if (!ignored) {
    const double label_logit = static_cast<double>(row[label]);
    const RowSum all = sum_of_exponentials(row, n, aligned, shared);
    top = all.largest;
    factor = static_cast<float>(scale / all.sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = static_cast<double>(all.largest) + log(all.sum) - label_logit;
  } else if (threadIdx.x == 0) {
    losses[blockIdx.x] = 0;
  }
  if (gradient == nullptr) return;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    Floats<kV> v{};
    if (!ignored) {
      v = load_floats<kV>(row, i, n, aligned);
#pragma unroll
      for (int k = 0; k < kV; ++k)
        v[k] = fast_exp(v[k] - top) * factor - (i + k == label ? static_cast<float>(scale) : 0.0f);
    }
    store_floats(out, i, n, aligned, v);
  }
}

__global__ void __launch_bounds__(kThreads)
    add_losses_kernel(const double* losses, double* loss, int rows, double scale) {
  auto& scratch = shared_memory<BlockScratch<double>>();
  double sum = 0;
  for (int t = static_cast<int>(threadIdx.x); t < rows; t += kThreads) sum += losses[t];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *loss = scale * sum;
}

// A number that is larger for a larger logit and, of equal ones, for the lower token. NaN counts as less than everything.
DEVICE_FN uint64_t rank_of(float logit, int token) {
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // -0 becomes 0
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return logit == logit ? uint64_t{ordered} << 32 | (0xffffffffu - static_cast<uint32_t>(token)) : 0;
}

struct Scores {  // each may be null
  double *log_prob, *lse;
  int* argmax;
};

__global__ void __launch_bounds__(kThreads)
    label_scores_kernel(const float* logits, const int* labels, Scores out, int n, bool aligned) {
  auto& shared = shared_memory<RowShared>();
  const float* row = logits + static_cast<int64_t>(blockIdx.x) * n;
  const int t = static_cast<int>(blockIdx.x);
  double log_prob = 0, lse = 0;
  uint64_t best = 0xffffffffu;  // token 0
  if (labels[t] != kIgnoredLabel) {
    const RowSum all = sum_of_exponentials(row, n, aligned, shared);
    lse = static_cast<double>(all.largest) + log(all.sum);
    log_prob = static_cast<double>(row[checked(labels[t], n)]) - lse;
    for (int i = first_column<kV>(); i < n && out.argmax != nullptr; i += column_step<kV>()) {
      const auto v = logits_at(row, i, n, aligned);
#pragma unroll
      for (int k = 0; k < kV; ++k) best = std::max(best, rank_of(v[k], i + k));
    }
    best = block_max(best, uint64_t{0}, shared.best);
  }
  if (threadIdx.x != 0) return;
  if (out.log_prob != nullptr) out.log_prob[t] = log_prob;
  if (out.lse != nullptr) out.lse[t] = lse;
  if (out.argmax != nullptr) out.argmax[t] = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
}

// f(first row, logits) for one chunk of rows after the other. Ignored rows are computed too: the host does not know which they are.
template <class Op, class F>
void for_each_chunk(const Op& op, F&& f) {
  const int64_t rows = op.x.dim(0), vocabulary = op.w.dim(0);
  int64_t chunk = op.chunk_rows;
  if (chunk == 0) {
    chunk = std::max(kDefaultChunkBytes / (4 * vocabulary) / kChunkRowsStep, int64_t{1}) * kChunkRowsStep;
  }
  chunk = std::min(chunk, rows);
  const Tensor logits = Tensor::empty({chunk, vocabulary}, DType::kF32, kDevice);
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t end = std::min(begin + chunk, rows);
    const Tensor result = logits.slice(0, end - begin);
    run(Gemm{.a = op.x.slice(begin, end), .b = op.w, .c = result, .trans_b = true, .compute = op.compute});
    f(begin, result);
  }
}

// dlogits: where gradients are wanted. They are bf16 if the products round them to bf16 anyway.
template <class G>
void loss_of_chunk(const LmHeadCrossEntropy& op, int64_t begin, const Tensor& logits, const Tensor& losses,
                   const Tensor& dlogits) {
  const int n = static_cast<int>(logits.dim(1));
  const float* from = logits.data<float>();
  G* to = dlogits.defined() ? dlogits.data<G>() : nullptr;
  launch<cross_entropy_kernel<G>>(
      {.blocks = {uint32_t(logits.dim(0))}, .threads = {row_threads(n, kV)}, .shared_bytes = sizeof(RowShared)}, from,
      op.labels.data<int32_t>() + begin, losses.data<double>() + begin, to, n, op.scale,
      aligned_rows(n, from) && aligned_rows(0, to));
}

void cross_entropy_device(const LmHeadCrossEntropy& op) {
  const MemoryScope scratch(MemoryCategory::kScratch);
  const bool gradient = op.dx.defined() || op.dw.defined(), narrow = op.compute == GemmCompute::kBF16;
  const Tensor losses = Tensor::empty({op.x.dim(0)}, DType::kF64, kDevice);
  Tensor buffer;
  for_each_chunk(op, [&](int64_t begin, const Tensor& logits) {
    const int64_t rows = logits.dim(0);
    if (gradient && narrow && !buffer.defined()) buffer = Tensor::empty(logits.shape(), DType::kBF16, kDevice);
    const Tensor dlogits = !gradient ? Tensor() : narrow ? buffer.slice(0, rows) : logits;
    narrow ? loss_of_chunk<bf16>(op, begin, logits, losses, dlogits)
           : loss_of_chunk<float>(op, begin, logits, losses, dlogits);
    if (op.dx.defined()) {
      run(Gemm{.a = dlogits, .b = op.w, .c = op.dx.slice(begin, begin + rows), .compute = op.compute});
    }
    if (op.dw.defined()) {
      const Tensor x = op.x.slice(begin, begin + rows);
      run(Gemm{.a = dlogits, .b = x, .c = op.dw, .trans_a = true, .beta = 1, .compute = op.compute});
    }
  });
  launch<add_losses_kernel>({.blocks = {1}, .threads = {kThreads}, .shared_bytes = sizeof(BlockScratch<double>)},
                            losses.data<double>(), op.loss.data<double>(), static_cast<int>(op.x.dim(0)), op.scale);
}

void label_scores_device(const LabelScores& op) {
  const MemoryScope scratch(MemoryCategory::kScratch);
  for_each_chunk(op, [&](int64_t begin, const Tensor& logits) {
    const int n = static_cast<int>(logits.dim(1));
    const Scores out{.log_prob = op.log_prob.defined() ? op.log_prob.data<double>() + begin : nullptr,
                     .lse = op.lse.defined() ? op.lse.data<double>() + begin : nullptr,
                     .argmax = op.argmax.defined() ? op.argmax.data<int32_t>() + begin : nullptr};
    launch<label_scores_kernel>(
        {.blocks = {uint32_t(logits.dim(0))}, .threads = {row_threads(n, kV)}, .shared_bytes = sizeof(RowShared)},
        logits.data<float>(), op.labels.data<int32_t>() + begin, out, n, aligned_rows(n, logits.data<float>()));
  });
}

const RegisterKernel<LmHeadCrossEntropy> register_loss{kDevice, &cross_entropy_device};
const RegisterKernel<LabelScores> register_scores{kDevice, &label_scores_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
