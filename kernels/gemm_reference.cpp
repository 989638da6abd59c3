// The definition of gemm.h in plain loops: one sum per element, over k in ascending order.

#include "kernels/access.h"
#include "kernels/gemm_epilogue.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

template <class T>
struct Elements {  // op(X)[i,j] in the compute type, rounded to bf16 first where asked
  const GemmMatrix& x;
  bool round;
  compute_t<T> at(int64_t i, int64_t j) const {
    const int64_t row = x.transposed ? j : i, column = x.transposed ? i : j;
    const compute_t<T> value = load(static_cast<const T*>(x.data), x.row_offset(row) + column);
    if constexpr (std::is_same_v<T, float>) return round ? static_cast<float>(bf16(value)) : value;
    return value;
  }
};

template <class A, class B, class C>
void multiply_rows(const GemmProblem& p, const GemmProblems& all, int64_t begin, int64_t end) {
  using Compute = compute_t<C>;
  const bool round = all.compute == GemmCompute::kBF16;
  const Elements<A> a{p.a, round};
  const Elements<B> b{p.b, round};
  const Compute alpha = static_cast<Compute>(all.alpha), beta = static_cast<Compute>(all.beta);
  std::vector<Compute> sum(static_cast<size_t>(p.n));
  for (int64_t i = begin; i < end; ++i) {
    std::fill(sum.begin(), sum.end(), Compute(0));
    for (int64_t k = 0; k < p.k; ++k) {
      const Compute factor = a.at(i, k);
      for (int64_t j = 0; j < p.n; ++j) sum[static_cast<size_t>(j)] += factor * b.at(k, j);
    }
    if (all.epilogue.kind != GemmEpilogueKind::kNone) {
      for (Compute& value : sum) value *= alpha;
      finish_row(all, p, i, sum.data());
      continue;
    }
    C* c = static_cast<C*>(p.c) + i * p.c_stride;
    for (int64_t j = 0; j < p.n; ++j) {
      const Compute value = alpha * sum[static_cast<size_t>(j)];
      store(c, j, all.beta == 0 ? value : value + beta * load(c, j));
    }
  }
}

template <class F>
void visit_small(DType dtype, F&& f) {
  if (dtype == DType::kBF16) return f.template operator()<bf16>();
  f.template operator()<float>();
}

void multiply(const GemmProblems& all) {
  for (const GemmProblem& p : all.items) {
    parallel_for(0, p.m, 1, [&](int64_t begin, int64_t end) {
      if (p.c_dtype == DType::kF64) return multiply_rows<double, double, double>(p, all, begin, end);
      visit_small(p.a.dtype, [&]<class A>() {
        visit_small(p.b.dtype, [&]<class B>() {
          visit_small(p.c_dtype, [&]<class C>() { multiply_rows<A, B, C>(p, all, begin, end); });
        });
      });
    });
  }
}

bool supports(const GemmDesc& desc) { return desc.device == DeviceKind::kCpu; }
double cost(const GemmDesc& desc) {
  constexpr double kFlopPerMicrosecond = 1e3;  // of one thread
  return 2.0 * static_cast<double>(desc.m) * static_cast<double>(desc.n) * static_cast<double>(desc.k) /
         (kFlopPerMicrosecond * num_threads());
}

const RegisterGemmBackend reference{{
    .name = "reference",
    .supports = &supports,
    .cost = &cost,
    .dense = [](const Gemm& op) { multiply(problems_of(op)); },
    .grouped_m = [](const GroupedGemmM& op) { multiply(problems_of(op)); },
    .grouped_k = [](const GroupedGemmK& op) { multiply(problems_of(op)); },
}};

}  // namespace
}  // namespace lightmoe
