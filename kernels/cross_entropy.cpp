#include "kernels/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu_math.h"
#include "kernels/labels.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kDefaultChunkBytes = 64 << 20;
constexpr int64_t kSumBlock = 256;  // f32 within a block, f64 across: 50,304 terms lose no digits
constexpr int64_t kCopyGrain = 64;  // rows a thread copies at least

DType accumulator_of(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

// Calls f(rows, logits) for one chunk of labelled rows after the other; f may overwrite the logits.
template <class Op, class F>
void for_each_chunk(const Op& op, F&& f) {
  const MemoryScope scratch(MemoryCategory::kScratch);
  const DType dtype = accumulator_of(op.x.dtype());
  const Tensor rows = labelled_rows(op.labels);
  const int64_t count = rows.dim(0), vocabulary = op.w.dim(0);
  const int64_t row_bytes = std::max<int64_t>(1, vocabulary * static_cast<int64_t>(size_of(dtype)));
  int64_t chunk = op.chunk_rows > 0 ? op.chunk_rows : std::max<int64_t>(1, kDefaultChunkBytes / row_bytes);
  chunk = std::min(chunk, count);
  const Tensor logits = Tensor::empty({chunk, vocabulary}, dtype);
  for (int64_t begin = 0; begin < count; begin += chunk) {
    const int64_t end = std::min(begin + chunk, count);
    const Tensor taken = rows.slice(begin, end), result = logits.slice(0, end - begin);
    run(GroupedGemmM{.a = op.x,
                     .a_rows = taken,
                     .offsets = Tensor::from<int32_t>({0, static_cast<int32_t>(end - begin)}, {2}),
                     .b = {op.w},
                     .c = result,
                     .trans_b = true,
                     .compute = op.compute});
    f(taken, result);
  }
}

// One maximum per lane, because compilers do not reorder a single one (of NaN and zeros the order would show).
template <class C>
C largest(const C* values, int64_t n) {
  constexpr int64_t kLanes = 16;
  C best[kLanes];
  std::fill_n(best, kLanes, values[0]);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) best[lane] = std::max(best[lane], values[j + lane]);
  }
  for (; j < n; ++j) best[0] = std::max(best[0], values[j]);
  return *std::max_element(best, best + kLanes);
}

// sum_j exp(values[j] - shift); with kKeep the exponentials replace the values.
template <bool kKeep, class C>
double sum_of_exponentials(C* values, int64_t n, C shift) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = std::min(begin + kSumBlock, n);
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; ++j) {
      const C e = exp_of(values[j] - shift);
      if constexpr (kKeep) values[j] = e;
      sum += e;
    }
    total += static_cast<double>(sum);
  }
  return total;
}

// The loss of one row; with kGradient its logits become scale * (softmax - onehot).
template <bool kGradient, class C>
double row_loss(C* logits, int64_t n, int32_t label, double scale) {
  const C shift = largest(logits, n);
  const double label_logit = static_cast<double>(logits[label]);
  const double sum = sum_of_exponentials<kGradient>(logits, n, shift);
  if constexpr (kGradient) {
    const C factor = static_cast<C>(scale / sum);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) logits[j] *= factor;
    logits[label] -= static_cast<C>(scale);
  }
  return static_cast<double>(shift) + std::log(sum) - label_logit;
}

template <class C>
double chunk_loss(const LmHeadCrossEntropy& op, const Tensor& rows, const Tensor& logits) {
  const int32_t *taken = rows.data<int32_t>(), *labels = op.labels.data<int32_t>();
  const int64_t vocabulary = logits.dim(1);
  const bool gradient = op.dx.defined() || op.dw.defined();
  std::vector<double> losses(static_cast<size_t>(rows.dim(0)));
  parallel_for(0, rows.dim(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      C* row = logits.data<C>() + i * vocabulary;
      const int32_t label = labels[taken[i]];
      losses[static_cast<size_t>(i)] = gradient ? row_loss<true>(row, vocabulary, label, op.scale)
                                                : row_loss<false>(row, vocabulary, label, op.scale);
    }
  });
  double sum = 0;
  for (const double loss : losses) sum += loss;
  return sum;
}

// dx[rows[i],:] = from[i,:]
void scatter_rows(const Tensor& from, const Tensor& rows, const Tensor& dx) {
  const int64_t row_bytes = dx.dim(1) * static_cast<int64_t>(size_of(dx.dtype()));
  parallel_for(0, rows.dim(0), kCopyGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* source = static_cast<const char*>(from.raw()) + i * row_bytes;
      std::copy_n(source, row_bytes, static_cast<char*>(dx.raw()) + rows.data<int32_t>()[i] * row_bytes);
    }
  });
}

void gradients(const LmHeadCrossEntropy& op, const Tensor& rows, const Tensor& dlogits) {
  if (op.dx.defined()) {
    const bool in_place = rows.dim(0) == op.dx.dim(0);  // one chunk without ignored rows
    const Tensor product = in_place ? op.dx : Tensor::empty({rows.dim(0), op.dx.dim(1)}, op.dx.dtype());
    run(Gemm{.a = dlogits, .b = op.w, .c = product, .compute = op.compute});
    if (!in_place) scatter_rows(product, rows, op.dx);
  }
  if (op.dw.defined()) {
    run(GroupedGemmK{.a = dlogits,
                     .b = op.x,
                     .b_rows = rows,
                     .offsets = Tensor::from<int32_t>({0, static_cast<int32_t>(rows.dim(0))}, {2}),
                     .c = {op.dw},
                     .beta = 1,
                     .compute = op.compute});
  }
}

void cross_entropy_cpu(const LmHeadCrossEntropy& op) {
  if (op.dx.defined()) op.dx.fill_zero();
  double sum = 0;
  for_each_chunk(op, [&](const Tensor& rows, const Tensor& logits) {
    sum += logits.dtype() == DType::kF64 ? chunk_loss<double>(op, rows, logits) : chunk_loss<float>(op, rows, logits);
    gradients(op, rows, logits);
  });
  op.loss.data<double>()[0] = op.scale * sum;
}

template <class C>
void score_rows(const LabelScores& op, const Tensor& rows, const Tensor& logits) {
  const int64_t vocabulary = logits.dim(1);
  parallel_for(0, rows.dim(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      C* row = logits.data<C>() + i * vocabulary;
      const int32_t t = rows.data<int32_t>()[i];
      const C shift = largest(row, vocabulary);
      if (op.argmax.defined()) {
        const int64_t first = std::find(row, row + vocabulary, shift) - row;
        op.argmax.data<int32_t>()[t] = first == vocabulary ? 0 : static_cast<int32_t>(first);  // NaN equals nothing
      }
      if (!op.log_prob.defined() && !op.lse.defined()) continue;
      const double lse = static_cast<double>(shift) + std::log(sum_of_exponentials<false>(row, vocabulary, shift));
      if (op.lse.defined()) op.lse.data<double>()[t] = lse;
      const int32_t label = op.labels.data<int32_t>()[t];
      if (op.log_prob.defined()) op.log_prob.data<double>()[t] = static_cast<double>(row[label]) - lse;
    }
  });
}

void label_scores_cpu(const LabelScores& op) {
  for (const Tensor& t : {op.log_prob, op.lse, op.argmax}) {
    if (t.defined()) t.fill_zero();
  }
  for_each_chunk(op, [&](const Tensor& rows, const Tensor& logits) {
    if (logits.dtype() == DType::kF64) return score_rows<double>(op, rows, logits);
    score_rows<float>(op, rows, logits);
  });
}

const RegisterKernel<LmHeadCrossEntropy> register_loss{DeviceKind::kCpu, &cross_entropy_cpu};
const RegisterKernel<LabelScores> register_scores{DeviceKind::kCpu, &label_scores_cpu};

template <class Op>
void check_inputs(const Op& op, const char* name) {
  require(op.x.defined() && op.x.rank() == 2 && op.w.defined() && op.w.rank() == 2 && op.w.dim(1) == op.x.dim(1),
          "{}: x {} and w {}, expected [T,D] and [V,D]", name, op.x.shape(), op.w.shape());
  require((op.x.dtype() == DType::kF64) == (op.w.dtype() == DType::kF64), "{}: x {} and w {}", name,
          name_of(op.x.dtype()), name_of(op.w.dtype()));
  require_tensor(op.labels, name, "labels", {op.x.dim(0)}, DType::kI32);
  require(op.chunk_rows >= 0, "{}: chunk_rows {}", name, op.chunk_rows);
  check_labels(op.labels, op.w.dim(0), name);
}

}  // namespace

void run(const LmHeadCrossEntropy& op) {
  constexpr const char* kName = "lm_head_cross_entropy";
  check_inputs(op, kName);
  require_tensor(op.loss, kName, "loss", {1}, DType::kF64);
  if (op.dx.defined()) require_tensor(op.dx, kName, "dx", op.x.shape(), op.x.dtype());
  if (op.dw.defined()) require_tensor(op.dw, kName, "dw", op.w.shape(), accumulator_of(op.x.dtype()));
  dispatch(op, op.x.device(), kName);
}

void run(const LabelScores& op) {
  constexpr const char* kName = "label_scores";
  check_inputs(op, kName);
  if (op.log_prob.defined()) require_tensor(op.log_prob, kName, "log_prob", {op.x.dim(0)}, DType::kF64);
  if (op.lse.defined()) require_tensor(op.lse, kName, "lse", {op.x.dim(0)}, DType::kF64);
  if (op.argmax.defined()) require_tensor(op.argmax, kName, "argmax", {op.x.dim(0)}, DType::kI32);
  dispatch(op, op.x.device(), kName);
}

}  // namespace lightmoe
