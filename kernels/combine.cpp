#include "kernels/combine.h"

#include <vector>

#include "kernels/access.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kGrainElements = 16384;

int64_t row_grain(int64_t width) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width)); }

// The pairs of every visit, in pair order: pairs[begin[v] .. begin[v+1]).
struct VisitPairs {
  std::vector<int32_t> begin, pairs;
  VisitPairs(const Tensor& pair_visit, int64_t visits)
      : begin(static_cast<size_t>(visits) + 1, 0), pairs(static_cast<size_t>(pair_visit.numel())) {
    const int32_t* visit = pair_visit.data<int32_t>();
    for (size_t p = 0; p < pairs.size(); ++p) ++begin[static_cast<size_t>(visit[p]) + 1];
    for (size_t v = 1; v < begin.size(); ++v) begin[v] += begin[v - 1];
    std::vector<int32_t> next(begin.begin(), begin.end() - 1);
    for (size_t p = 0; p < pairs.size(); ++p) {
      pairs[static_cast<size_t>(next[static_cast<size_t>(visit[p])]++)] = static_cast<int32_t>(p);
    }
  }
};

// y[v,:] = sum of weight(p) x[p,:] over the pairs of v, in f32 (f64).
template <class T, class Weight>
void sum_over_pairs(const Tensor& x_rows, const Tensor& pair_visit, const Tensor& y_rows, const Weight& weight) {
  using C = compute_t<T>;
  const int64_t visits = y_rows.dim(0), width = y_rows.dim(1);
  const VisitPairs of(pair_visit, visits);
  const T* x = x_rows.data<T>();
  T* y = y_rows.data<T>();
  parallel_for(0, visits, row_grain(width), [&](int64_t begin, int64_t end) {
    std::vector<C> sum(static_cast<size_t>(width));
    for (int64_t v = begin; v < end; ++v) {
      std::fill(sum.begin(), sum.end(), C(0));
      for (int32_t i = of.begin[static_cast<size_t>(v)]; i < of.begin[static_cast<size_t>(v) + 1]; ++i) {
        const int64_t p = of.pairs[static_cast<size_t>(i)];
        const C w = weight(p);
        for (int64_t f = 0; f < width; ++f) sum[static_cast<size_t>(f)] += w * load(x, p * width + f);
      }
      for (int64_t f = 0; f < width; ++f) store(y, v * width + f, sum[static_cast<size_t>(f)]);
    }
  });
}

void gated_sum_cpu(const GatedSum& op) {
  visit_floating("gated_sum", op.a.dtype(), [&]<class T>() {
    const compute_t<T>* gates = op.gates.data<compute_t<T>>();
    const int32_t* index = op.pair_index.data<int32_t>();
    sum_over_pairs<T>(op.a, op.pair_visit, op.s, [=](int64_t p) { return gates[index[p]]; });
  });
}

void sum_pairs_cpu(const SumPairs& op) {
  visit_floating("sum_pairs", op.x.dtype(), [&]<class T>() {
    sum_over_pairs<T>(op.x, op.pair_visit, op.y, [](int64_t) { return compute_t<T>(1); });
  });
}

template <class T>
void gated_sum_backward(const GatedSumBackward& op) {
  using C = compute_t<T>;
  const int64_t width = op.a.dim(1);
  const T *a = op.a.data<T>(), *ds = op.ds.data<T>();
  const C* gates = op.gates.data<C>();
  const int32_t *index = op.pair_index.data<int32_t>(), *visit = op.pair_visit.data<int32_t>();
  T* da = op.da.defined() ? op.da.data<T>() : nullptr;
  C* dgates = op.dgates.defined() ? op.dgates.data<C>() : nullptr;
  parallel_for(0, op.a.dim(0), row_grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const T *row = a + p * width, *gradient = ds + visit[p] * width;
      if (dgates != nullptr) {
        C sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t f = 0; f < width; ++f) sum += load(row, f) * load(gradient, f);
        dgates[index[p]] = op.accumulate_dgates ? dgates[index[p]] + sum : sum;
      }
      if (da == nullptr) continue;
      const C gate = gates[index[p]];
      T* out = da + p * width;
      if (op.accumulate_da) {
        for (int64_t f = 0; f < width; ++f) store(out, f, load(out, f) + gate * load(gradient, f));
      } else {
        for (int64_t f = 0; f < width; ++f) store(out, f, gate * load(gradient, f));
      }
    }
  });
}

void gated_sum_backward_cpu(const GatedSumBackward& op) {
  visit_floating("gated_sum_backward", op.a.dtype(), [&]<class T>() { gated_sum_backward<T>(op); });
}

void expand_pairs_cpu(const ExpandPairs& op) {
  const int64_t row_bytes = op.x.dim(1) * static_cast<int64_t>(size_of(op.x.dtype()));
  const char* x = static_cast<const char*>(op.x.raw());
  char* y = static_cast<char*>(op.y.raw());
  const int32_t* visit = op.pair_visit.data<int32_t>();
  parallel_for(0, op.y.dim(0), row_grain(op.x.dim(1)), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) std::copy_n(x + visit[p] * row_bytes, row_bytes, y + p * row_bytes);
  });
}

template <class T>
void combine(const Combine& op) {
  using C = compute_t<T>;
  const int64_t width = op.y.dim(1), terms = op.index.dim(1);
  const T* x = op.x.data<T>();
  T* y = op.y.data<T>();
  const int32_t* index = op.index.data<int32_t>();
  const C* scales = op.scales.defined() ? op.scales.data<C>() : nullptr;
  parallel_for(0, op.y.dim(0), row_grain(width), [&](int64_t begin, int64_t end) {
    std::vector<C> sum(static_cast<size_t>(width));
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < width; ++i) {
        sum[static_cast<size_t>(i)] = op.accumulate ? load(y, t * width + i) : C(0);
      }
      for (int64_t j = t * terms; j < (t + 1) * terms; ++j) {
        if (index[j] < 0) continue;
        const C scale = scales != nullptr ? scales[j] : C(1);
        const T* row = x + index[j] * width;
        for (int64_t i = 0; i < width; ++i) sum[static_cast<size_t>(i)] += scale * load(row, i);
      }
      for (int64_t i = 0; i < width; ++i) store(y, t * width + i, sum[static_cast<size_t>(i)]);
    }
  });
}

void combine_cpu(const Combine& op) {
  visit_floating("combine", op.y.dtype(), [&]<class T>() { combine<T>(op); });
}

const RegisterKernel<GatedSum> register_gated_sum{DeviceKind::kCpu, &gated_sum_cpu};
const RegisterKernel<GatedSumBackward> register_gated_sum_backward{DeviceKind::kCpu, &gated_sum_backward_cpu};
const RegisterKernel<SumPairs> register_sum_pairs{DeviceKind::kCpu, &sum_pairs_cpu};
const RegisterKernel<ExpandPairs> register_expand_pairs{DeviceKind::kCpu, &expand_pairs_cpu};
const RegisterKernel<Combine> register_combine{DeviceKind::kCpu, &combine_cpu};

void require_matrix(const Tensor& t, const char* op, const char* name) {
  require(t.rank() == 2, "{}: {} is {}, expected a matrix", op, name, t.shape());
}

void require_indices(const Tensor& t, const char* op, const char* name, const Shape& shape, int64_t limit) {
  require_tensor(t, op, name, shape, DType::kI32);
  if (t.device() != DeviceKind::kCpu) return;
  const int32_t* values = t.data<int32_t>();
  int32_t least = 0, largest = -1;
  for (int64_t i = 0; i < t.numel(); ++i) {
    least = std::min(least, values[i]);
    largest = std::max(largest, values[i]);
  }
  require(least >= 0 && largest < limit, "{}: {} has values in [{}, {}], expected [0, {})", op, name, least, largest,
          limit);
}

void require_pairs(const char* op, const Tensor& pair_visit, int64_t pairs, int64_t visits) {
  require_indices(pair_visit, op, "pair_visit", {pairs}, visits);
}

}  // namespace

void run(const GatedSum& op) {
  require_matrix(op.a, "gated_sum", "a");
  require_matrix(op.s, "gated_sum", "s");
  require_tensor(op.s, "gated_sum", "s", {op.s.dim(0), op.a.dim(1)}, op.a.dtype());
  require_tensor(op.gates, "gated_sum", "gates", op.gates.shape(), accumulator_of(op.a.dtype()));
  require_indices(op.pair_index, "gated_sum", "pair_index", {op.a.dim(0)}, op.gates.numel());
  require_pairs("gated_sum", op.pair_visit, op.a.dim(0), op.s.dim(0));
  dispatch(op, op.a.device(), "gated_sum");
}

void run(const GatedSumBackward& op) {
  require_matrix(op.a, "gated_sum_backward", "a");
  require_matrix(op.ds, "gated_sum_backward", "ds");
  const DType accumulator = accumulator_of(op.a.dtype());
  require_tensor(op.ds, "gated_sum_backward", "ds", {op.ds.dim(0), op.a.dim(1)}, op.a.dtype());
  require_tensor(op.gates, "gated_sum_backward", "gates", op.gates.shape(), accumulator);
  require_indices(op.pair_index, "gated_sum_backward", "pair_index", {op.a.dim(0)}, op.gates.numel());
  require_pairs("gated_sum_backward", op.pair_visit, op.a.dim(0), op.ds.dim(0));
  if (op.da.defined()) require_tensor(op.da, "gated_sum_backward", "da", op.a.shape(), op.a.dtype());
  if (op.dgates.defined()) require_tensor(op.dgates, "gated_sum_backward", "dgates", op.gates.shape(), accumulator);
  dispatch(op, op.a.device(), "gated_sum_backward");
}

void run(const SumPairs& op) {
  require_matrix(op.x, "sum_pairs", "x");
  require_matrix(op.y, "sum_pairs", "y");
  require_tensor(op.y, "sum_pairs", "y", {op.y.dim(0), op.x.dim(1)}, op.x.dtype());
  require_pairs("sum_pairs", op.pair_visit, op.x.dim(0), op.y.dim(0));
  dispatch(op, op.x.device(), "sum_pairs");
}

void run(const ExpandPairs& op) {
  require_matrix(op.x, "expand_pairs", "x");
  require_matrix(op.y, "expand_pairs", "y");
  require_tensor(op.y, "expand_pairs", "y", {op.y.dim(0), op.x.dim(1)}, op.x.dtype());
  require_pairs("expand_pairs", op.pair_visit, op.y.dim(0), op.x.dim(0));
  dispatch(op, op.x.device(), "expand_pairs");
}

void run(const Combine& op) {
  require_matrix(op.x, "combine", "x");
  require_matrix(op.y, "combine", "y");
  require_matrix(op.index, "combine", "index");
  require_tensor(op.y, "combine", "y", {op.index.dim(0), op.x.dim(1)}, op.x.dtype());
  require_tensor(op.index, "combine", "index", op.index.shape(), DType::kI32);
  if (op.scales.defined())
    require_tensor(op.scales, "combine", "scales", op.index.shape(), accumulator_of(op.x.dtype()));
  dispatch(op, op.x.device(), "combine");
}

}  // namespace lightmoe
