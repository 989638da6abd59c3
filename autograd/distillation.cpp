#include <algorithm>
#include <cmath>
#include <vector>

#include "autograd/distillation.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int32_t kIgnored = -100;
constexpr int64_t kChunkBytes = 32 << 20;  // of logits, twice

// probabilities of logits / temperature; returns log-sum-exp of those.
template <class T>
double softmax(const T* logits, int64_t n, double temperature, std::vector<double>& p) {
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

// Overwrites the student's logits with the gradient of scale * ((1 - w) CE + w T^2 KL).
template <class T>
RowLoss row_loss(T* student, const T* teacher, int64_t n, int32_t label, const Distillation& d, double scale) {
  std::vector<double> p(static_cast<size_t>(n)), soft(p), target(p);
  const double lse = softmax(student, n, 1, p);
  const double student_lse = softmax(student, n, d.temperature, soft);
  const double teacher_lse = softmax(teacher, n, d.temperature, target);
  RowLoss loss{.ce = lse - static_cast<double>(student[label])};
  for (int64_t j = 0; j < n; ++j) {
    const auto k = static_cast<size_t>(j);
    const double gap = static_cast<double>(teacher[j]) - static_cast<double>(student[j]);
    loss.kl += target[k] * (gap / d.temperature - teacher_lse + student_lse);
  }
  for (int64_t j = 0; j < n; ++j) {
    const auto k = static_cast<size_t>(j);
    const double hard = p[k] - (j == label ? 1 : 0);
    student[j] = static_cast<T>(scale * ((1 - d.weight) * hard + d.weight * d.temperature * (soft[k] - target[k])));
  }
  return loss;
}

Tensor rows_of(const Tensor& x, const std::vector<int32_t>& rows, size_t begin, size_t end) {
  const Tensor out = Tensor::empty({static_cast<int64_t>(end - begin), x.dim(1)}, x.dtype());
  for (size_t i = begin; i < end; ++i) out.row(static_cast<int64_t>(i - begin)).copy_from(x.row(rows[i]));
  return out;
}

template <class T>
DistillationLoss run_rows(const Var& x, const ParameterPtr& w, const Tensor& labels, const Distillation& d,
                          const Tensor& dx, double scale, GemmCompute compute) {
  std::vector<int32_t> rows;
  for (int64_t t = 0; t < labels.numel(); ++t) {
    if (labels.data<int32_t>()[t] != kIgnored) rows.push_back(static_cast<int32_t>(t));
  }
  const int64_t vocabulary = w->value.dim(0);
  const Tensor& teacher_head = d.head.defined() ? d.head : w->value;
  const auto chunk =
      static_cast<size_t>(std::max<int64_t>(1, kChunkBytes / (vocabulary * static_cast<int64_t>(sizeof(T)))));
  DistillationLoss sum;
  for (size_t begin = 0; begin < rows.size(); begin += chunk) {
    const size_t end = std::min(begin + chunk, rows.size());
    const auto count = static_cast<int64_t>(end - begin);
    const Tensor student = Tensor::empty({count, vocabulary}, x.value.dtype()),
                 teacher = Tensor::empty(student.shape(), x.value.dtype());
    run(Gemm{
        .a = rows_of(x.value, rows, begin, end), .b = w->value, .c = student, .trans_b = true, .compute = compute});
    run(Gemm{.a = rows_of(d.teacher, rows, begin, end),
             .b = teacher_head,
             .c = teacher,
             .trans_b = true,
             .compute = compute});
    std::vector<RowLoss> losses(static_cast<size_t>(count));
    parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int32_t label = labels.data<int32_t>()[rows[begin + static_cast<size_t>(i)]];
        losses[static_cast<size_t>(i)] = row_loss(student.data<T>() + i * vocabulary,
                                                  teacher.data<T>() + i * vocabulary, vocabulary, label, d, scale);
      }
    });
    for (const RowLoss& loss : losses) sum.ce_sum += loss.ce, sum.kl_sum += loss.kl;
    if (!dx.defined()) continue;
    const Tensor product = Tensor::empty({count, dx.dim(1)}, dx.dtype());
    run(Gemm{.a = student, .b = w->value, .c = product, .compute = compute});
    for (size_t i = begin; i < end; ++i) dx.row(rows[i]).copy_from(product.row(static_cast<int64_t>(i - begin)));
  }
  return sum;
}

}  // namespace

DistillationLoss distillation_loss(Tape& tape, const Var& x, const ParameterPtr& w, const Tensor& labels,
                                   const Distillation& d, const LossScale& scale) {
  require(d.teacher.defined() && d.teacher.shape() == x.value.shape() && d.teacher.dtype() == x.value.dtype(),
          "distillation: the teacher's states are not of the student's shape and type");
  require(!d.head.defined() || d.head.shape() == w->value.shape(),
          "distillation: the teacher's head is {}, expected {}", d.head.shape(), w->value.shape());
  check(!w->trainable, ErrorKind::kUsage, "distillation: {} trains, but both models read it", w->name);
  check(is_host_memory(x.value.device()), ErrorKind::kDevice, "distillation runs on the CPU only, not on {}",
        name_of(x.value.device()));
  Tensor dx;
  if (tape.recording() && x.grad) dx = Tensor::zeros(x.value.shape(), x.value.dtype());
  const DistillationLoss loss = x.value.dtype() == DType::kF64
                                    ? run_rows<double>(x, w, labels, d, dx, scale.scale, scale.compute)
                                    : run_rows<float>(x, w, labels, d, dx, scale.scale, scale.compute);
  if (dx.defined()) tape.record([dx, slot = x.grad] { slot->add(dx); });
  return loss;
}

}  // namespace lightmoe
