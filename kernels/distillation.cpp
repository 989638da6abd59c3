#include "kernels/distillation.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/indexing.h"
#include "kernels/labels.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kDefaultChunkBytes = 32 << 20;  // of logits, twice

DType logit_type(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

// probabilities of logits / temperature; returns log-sum-exp of those.
template <class C>
double softmax(const C* logits, int64_t n, double temperature, std::vector<double>& p) {
  const double shift = static_cast<double>(*std::max_element(logits, logits + n)) / temperature;
  double sum = 0;
  for (int64_t j = 0; j < n; ++j)
    sum += p[static_cast<size_t>(j)] = std::exp(static_cast<double>(logits[j]) / temperature - shift);
  for (int64_t j = 0; j < n; ++j) p[static_cast<size_t>(j)] /= sum;
  return shift + std::log(sum);
}

struct RowLoss {
  double ce = 0, kl = 0;
};

// Overwrites the student's logits with the gradient.
template <class C>
RowLoss row_loss(C* student, const C* teacher, int64_t n, int32_t label, const LmHeadDistillation& op) {
  std::vector<double> p(static_cast<size_t>(n)), soft(p), target(p);
  const double lse = softmax(student, n, 1, p);
  const double student_lse = softmax(student, n, op.temperature, soft);
  const double teacher_lse = softmax(teacher, n, op.temperature, target);
  RowLoss loss{.ce = lse - static_cast<double>(student[label])};
  for (int64_t j = 0; j < n; ++j) {
    const double gap = static_cast<double>(teacher[j]) - static_cast<double>(student[j]);
    loss.kl += target[static_cast<size_t>(j)] * (gap / op.temperature - teacher_lse + student_lse);
  }
  for (int64_t j = 0; j < n; ++j) {
    const auto k = static_cast<size_t>(j);
    const double hard = p[k] - (j == label ? 1 : 0), gap = soft[k] - target[k];
    student[j] = static_cast<C>(op.scale * ((1 - op.weight) * hard + op.weight * op.temperature * gap));
  }
  return loss;
}

template <class C>
RowLoss chunk_loss(const LmHeadDistillation& op, const Tensor& rows, const Tensor& student, const Tensor& teacher) {
  const int64_t n = student.dim(1);
  std::vector<RowLoss> losses(static_cast<size_t>(rows.dim(0)));
  parallel_for(0, rows.dim(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t label = op.labels.data<int32_t>()[rows.data<int32_t>()[i]];
      losses[static_cast<size_t>(i)] = row_loss(student.data<C>() + i * n, teacher.data<C>() + i * n, n, label, op);
    }
  });
  RowLoss sum;
  for (const RowLoss& loss : losses) sum.ce += loss.ce, sum.kl += loss.kl;
  return sum;
}

// The logits of the rows taken.
void head(const Tensor& x, const Tensor& w, const Tensor& rows, const Tensor& logits, GemmCompute compute) {
  run(GroupedGemmM{.a = x,
                   .a_rows = rows,
                   .offsets = Tensor::from<int32_t>({0, static_cast<int32_t>(rows.dim(0))}, {2}),
                   .b = {w},
                   .c = logits,
                   .trans_b = true,
                   .compute = compute});
}

void distillation_cpu(const LmHeadDistillation& op) {
  const MemoryScope scratch(MemoryCategory::kScratch);
  if (op.dx.defined()) op.dx.fill_zero();
  const Tensor rows = labelled_rows(op.labels);
  const int64_t count = rows.dim(0);
  const DType dtype = logit_type(op.x.dtype());
  const int64_t n = op.w.dim(0), fits = kDefaultChunkBytes / (n * static_cast<int64_t>(size_of(dtype)));
  const int64_t chunk = std::min(op.chunk_rows > 0 ? op.chunk_rows : std::max<int64_t>(1, fits), count);
  const Tensor student = Tensor::empty({chunk, n}, dtype), teacher = Tensor::empty({chunk, n}, dtype);
  RowLoss sum;
  for (int64_t begin = 0; begin < count; begin += chunk) {
    const int64_t end = std::min(begin + chunk, count);
    const Tensor taken = rows.slice(begin, end), z = student.slice(0, end - begin), t = teacher.slice(0, end - begin);
    head(op.x, op.w, taken, z, op.compute);
    head(op.teacher, op.teacher_w, taken, t, op.compute);
    const RowLoss loss =
        dtype == DType::kF64 ? chunk_loss<double>(op, taken, z, t) : chunk_loss<float>(op, taken, z, t);
    sum.ce += loss.ce, sum.kl += loss.kl;
    if (!op.dx.defined()) continue;
    const Tensor product = Tensor::empty({end - begin, op.dx.dim(1)}, op.dx.dtype());
    run(Gemm{.a = z, .b = op.w, .c = product, .compute = op.compute});
    run(ScatterRows{.x = product, .index = taken, .y = op.dx});
  }
  op.losses.data<double>()[0] = sum.ce, op.losses.data<double>()[1] = sum.kl;
}

const RegisterKernel<LmHeadDistillation> register_cpu{DeviceKind::kCpu, &distillation_cpu};

constexpr const char* kName = "lm_head_distillation";

void check_head(const Tensor& x, const Tensor& w, const char* what) {
  require(x.defined() && x.rank() == 2 && w.defined() && w.rank() == 2 && w.dim(1) == x.dim(1),
          "{}: {} is {} and its head {}, expected [T,D] and [V,D]", kName, what, x.shape(), w.shape());
  require((x.dtype() == DType::kF64) == (w.dtype() == DType::kF64), "{}: {} {} and its head {}", kName, what,
          name_of(x.dtype()), name_of(w.dtype()));
}

}  // namespace

void run(const LmHeadDistillation& op) {
  check_head(op.x, op.w, "x");
  check_head(op.teacher, op.teacher_w, "the teacher");
  require_tensor(op.teacher, kName, "teacher", {op.x.dim(0), op.teacher.dim(1)}, op.x.dtype());
  require(op.w.dim(0) == op.teacher_w.dim(0), "{}: vocabularies of {} and {}", kName, op.w.dim(0), op.teacher_w.dim(0));
  require_tensor(op.labels, kName, "labels", {op.x.dim(0)}, DType::kI32);
  require_tensor(op.losses, kName, "losses", {2}, DType::kF64);
  if (op.dx.defined()) require_tensor(op.dx, kName, "dx", op.x.shape(), op.x.dtype());
  require(op.temperature > 0 && op.chunk_rows >= 0, "{}: temperature {}, chunk_rows {}", kName, op.temperature,
          op.chunk_rows);
  check_labels(op.labels, op.w.dim(0), kName);
  dispatch(op, op.x.device(), kName);
}

}  // namespace lightmoe
