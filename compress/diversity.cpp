#include "compress/diversity.h"

#include <algorithm>
#include <cmath>

#include "autograd/ops.h"
#include "compress/linear_algebra.h"
#include "model/olmoe.h"

namespace lightmoe {
namespace {

// Entry (i,j) of a Gram matrix as a cosine; 0 beside a zero vector.
double cosine(const Tensor& gram, int64_t i, int64_t j) {
  const int64_t n = gram.dim(0);
  const double* g = gram.data<double>();
  const double size = std::sqrt(g[i * n + i] * g[j * n + j]);
  return size > 0 ? g[i * n + j] / size : 0;
}

CosineSummary summary_of(const std::vector<double>& cosines) {
  CosineSummary s;
  for (const double c : cosines) {
    s.mean += c, s.mean_abs += std::fabs(c);
    s.largest = std::max(s.largest, c);
  }
  const auto count = static_cast<double>(std::max<size_t>(1, cosines.size()));
  s.mean /= count, s.mean_abs /= count;
  return s;
}

std::vector<double> pairs(const Tensor& gram) {
  std::vector<double> all;
  for (int64_t i = 0; i < gram.dim(0); ++i) {
    for (int64_t j = i + 1; j < gram.dim(0); ++j) all.push_back(cosine(gram, i, j));
  }
  return all;
}

std::vector<Expert> stored(const MoeLayer& layer) {
  std::vector<Expert> experts;
  for (const Expert& e : layer.experts) {
    if (e.gate_up != nullptr) experts.push_back(e);
  }
  return experts;
}

Tensor weight_rows(const std::vector<Expert>& experts) {
  const int64_t a = experts[0].gate_up->value.numel(), b = experts[0].down->value.numel();
  const Tensor rows = Tensor::empty({static_cast<int64_t>(experts.size()), a + b}, DType::kF64);
  for (size_t i = 0; i < experts.size(); ++i) {
    const Tensor row = rows.row(static_cast<int64_t>(i));
    row.slice(0, a).copy_from(experts[i].gate_up->value.to(DType::kF64).reshape({a}));
    row.slice(a, a + b).copy_from(experts[i].down->value.to(DType::kF64).reshape({b}));
  }
  return rows;
}

// Mean over the rows of x of the cosine of each pair's outputs.
std::vector<double> output_cosines(const std::vector<Expert>& experts, const Tensor& x) {
  const auto n = static_cast<int64_t>(experts.size());
  std::vector<Tensor> outputs;
  for (const Expert& e : experts) {
    Tape tape(false);
    const Var h = linear(tape, Tape::constant(x), e.gate_up, GemmCompute::kF32);
    outputs.push_back(linear(tape, swiglu(tape, h), e.down, GemmCompute::kF32).value.to(DType::kF64));
  }
  std::vector<double> mean(static_cast<size_t>(n * (n - 1) / 2), 0.0);
  const Tensor at_token = Tensor::empty({n, x.dim(1)}, DType::kF64);
  for (int64_t t = 0; t < x.dim(0); ++t) {
    for (int64_t i = 0; i < n; ++i) at_token.row(i).copy_from(outputs[static_cast<size_t>(i)].row(t));
    const std::vector<double> now = pairs(product(at_token, false, at_token, true));
    for (size_t p = 0; p < mean.size(); ++p) mean[p] += now[p] / static_cast<double>(x.dim(0));
  }
  return mean;
}

Tensor sample_rows(const Statistics& statistics, size_t layer, int64_t limit) {
  const std::vector<float>& all = statistics.layers[layer].sample_inputs;
  check(!all.empty(), ErrorKind::kUsage,
        "the statistics hold no inputs of the sampled tokens: lightmoe calibrate --sample-inputs");
  const int64_t d = statistics.hidden, count = static_cast<int64_t>(all.size()) / d, n = std::min(limit, count);
  const Tensor rows = Tensor::empty({n, d}, DType::kF32);
  for (int64_t i = 0; i < n; ++i) std::copy_n(all.data() + i * count / n * d, d, rows.data<float>() + i * d);
  return rows;
}

}  // namespace

CosineSummary pairwise_cosine(const Tensor& vectors) {
  return summary_of(pairs(product(vectors, false, vectors, true)));
}

std::vector<LayerDiversity> expert_diversity(const std::filesystem::path& directory, const Statistics* statistics,
                                             int64_t limit) {
  check(limit >= 1, ErrorKind::kUsage, "a sample of {} rows: expected at least 1", limit);
  const std::unique_ptr<Olmoe> model = load_model(directory, DType::kF32);
  std::vector<LayerDiversity> all;
  for (size_t l = 0; l < model->blocks.size(); ++l) {
    const std::vector<Expert> experts = stored(model->blocks[l].moe);
    LayerDiversity& d = all.emplace_back();
    d.layer = static_cast<int64_t>(l), d.experts = static_cast<int64_t>(experts.size());
    if (experts.size() < 2) continue;
    d.weights = pairwise_cosine(weight_rows(experts));
    if (statistics != nullptr) d.outputs = summary_of(output_cosines(experts, sample_rows(*statistics, l, limit)));
  }
  return all;
}

}  // namespace lightmoe
