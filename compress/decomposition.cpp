#include "compress/decomposition.h"

#include <algorithm>
#include <numeric>

#include "compress/linear_algebra.h"

namespace lightmoe {
namespace {

Tensor without(const Tensor& w, const LowRank& part) {
  const Tensor rest = w.clone(), made = product(part.b, false, part.a, false);
  for (int64_t i = 0; i < rest.numel(); ++i) rest.data<double>()[i] -= made.data<double>()[i];
  return rest;
}

std::vector<double> unit_squares(const ExpertMatrices& e) {
  const int64_t f = e.gate.dim(0), d = e.gate.dim(1);
  std::vector<double> sum(static_cast<size_t>(f), 0.0);
  for (int64_t u = 0; u < f; ++u) {
    for (int64_t i = 0; i < d; ++i) {
      const double g = e.gate.data<double>()[u * d + i], p = e.up.data<double>()[u * d + i],
                   w = e.down.data<double>()[i * f + u];
      sum[static_cast<size_t>(u)] += g * g + p * p + w * w;
    }
  }
  return sum;
}

}  // namespace

Decomposition decompose(const MethodInput& input, int64_t layer, const BankEntry& group, int64_t rank) {
  const ExpertMatrices whole = merged_expert(input, layer, group, {.align = true});
  const auto low_rank = [&](const Tensor& w) { return best_low_rank(w, rank, input.options.seed); };
  Decomposition d{.gate = low_rank(whole.gate), .up = low_rank(whole.up), .down = low_rank(whole.down)};
  d.sparse = {.gate = without(whole.gate, d.gate), .up = without(whole.up, d.up), .down = without(whole.down, d.down)};
  const std::vector<double> missing = unit_squares(d.sparse);
  d.order.resize(missing.size());
  std::iota(d.order.begin(), d.order.end(), 0);
  std::stable_sort(d.order.begin(), d.order.end(), [&](int32_t a, int32_t b) {
    return missing[static_cast<size_t>(a)] > missing[static_cast<size_t>(b)];
  });
  d.sparse = with_units(d.sparse, d.order);
  // The factors' sides of hidden units, as if they were an expert's matrices.
  const ExpertMatrices sides = with_units({.gate = d.gate.b, .up = d.up.b, .down = d.down.a}, d.order);
  d.gate.b = sides.gate, d.up.b = sides.up, d.down.a = sides.down;
  return d;
}

Tensor first_units(const Tensor& w, ExpertMatrix matrix, int64_t units) {
  if (matrix != ExpertMatrix::kDown) return w.slice(0, units);
  const int64_t rows = w.dim(0);
  const Tensor out = Tensor::empty({rows, units}, w.dtype());
  for (int64_t i = 0; i < rows; ++i) out.row(i).copy_from(w.row(i).slice(0, units));
  return out;
}

}  // namespace lightmoe
