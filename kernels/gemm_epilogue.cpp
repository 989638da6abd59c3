#include "kernels/gemm_epilogue.h"

#include "kernels/access.h"
#include "kernels/cpu_math.h"

namespace lightmoe {
namespace {

template <class T>
class Row {
 public:
  using C = compute_t<T>;
  Row(const GemmProblems& all, const GemmProblem& p, int64_t i)
      : e_(all.epilogue), beta_(static_cast<C>(all.beta)), row_(p.first_row + i) {
    index_ = e_.scale_rows.defined() ? e_.scale_rows.template data<int32_t>()[row_] : row_;
    scale_ = e_.scales.defined() ? e_.scales.template data<C>()[index_] : C(1);
    c_ = p.c != nullptr ? static_cast<T*>(p.c) + i * p.c_stride : nullptr;
  }
  void scale(const C* values, int64_t n) const {
    for (int64_t j = 0; j < n; ++j) {
      const C value = scale_ * values[j];
      store(c_, j, beta_ == 0 ? value : value + beta_ * load(c_, j));
    }
  }
  void swiglu(const C* values, int64_t width) const {
    T* out = row_of(e_.activated, width);
    for (int64_t f = 0; f < width; ++f) {
      const T gate = static_cast<T>(values[f]), up = static_cast<T>(values[width + f]);
      if (c_ != nullptr) c_[f] = gate, c_[width + f] = up;
      const C g = static_cast<C>(gate), sigmoid = C(1) / (C(1) + exp_of(-g));
      store(out, f, scale_ * (g * sigmoid * static_cast<C>(up)));
    }
  }
  void swiglu_backward(const C* values, int64_t width) const {
    const T* h = row_of(e_.h, 2 * width);
    T* out = e_.activated.defined() ? row_of(e_.activated, width) : nullptr;
    C dot = 0;
    for (int64_t f = 0; f < width; ++f) {
      const C g = load(h, f), u = load(h, width + f), sigmoid = C(1) / (C(1) + exp_of(-g)), silu = g * sigmoid;
      const C d = scale_ * values[f];
      store(c_, f, d * u * (sigmoid + silu * (C(1) - sigmoid)));
      store(c_, width + f, d * silu);
      if (out != nullptr) store(out, f, scale_ * (silu * u));
      dot += values[f] * (silu * u);
    }
    if (e_.dots.defined()) e_.dots.template data<C>()[index_] = dot;
  }

 private:
  T* row_of(const Tensor& t, int64_t columns) const { return t.data<T>() + row_ * columns; }

  const GemmEpilogue& e_;
  C beta_, scale_ = 1;
  int64_t row_, index_ = 0;
  T* c_ = nullptr;
};

template <class T>
void finish(const GemmProblems& all, const GemmProblem& p, int64_t i, const compute_t<T>* values) {
  const Row<T> row(all, p, i);
  switch (all.epilogue.kind) {
    case GemmEpilogueKind::kNone:
      break;
    case GemmEpilogueKind::kScale:
      row.scale(values, p.n);
      break;
    case GemmEpilogueKind::kSwiGlu:
      row.swiglu(values, p.n / 2);
      break;
    case GemmEpilogueKind::kSwiGluBackward:
      row.swiglu_backward(values, p.n);
      break;
  }
}

}  // namespace

void finish_row(const GemmProblems& all, const GemmProblem& p, int64_t i, const float* values) {
  p.c_dtype == DType::kBF16 ? finish<bf16>(all, p, i, values) : finish<float>(all, p, i, values);
}
void finish_row(const GemmProblems& all, const GemmProblem& p, int64_t i, const double* values) {
  finish<double>(all, p, i, values);
}

}  // namespace lightmoe
