#include "compress/expert_sample.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "compress/weights.h"
#include "kernels/gemm.h"
#include "kernels/swiglu.h"

namespace lightmoe {
namespace {

constexpr int64_t kRowsPerBlock = 64;

// One token's routing from its logits.
void route(const float* logits, size_t slots, size_t top_k, bool renormalize, LayerSample& out) {
  const double top = *std::max_element(logits, logits + slots);
  const size_t first = out.probs.size();
  double sum = 0;
  for (size_t e = 0; e < slots; ++e) {
    out.probs.push_back(std::exp(static_cast<double>(logits[e]) - top));
    sum += out.probs.back();
  }
  double* p = &out.probs[first];
  for (size_t e = 0; e < slots; ++e) p[e] /= sum;
  std::vector<int32_t> order(slots);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [p](int32_t a, int32_t b) { return p[a] > p[b]; });
  double chosen = 0;
  for (size_t k = 0; k < top_k; ++k) chosen += p[order[k]];
  for (size_t k = 0; k < top_k; ++k) {
    out.slots.push_back(order[k]);
    out.gates.push_back(renormalize ? p[order[k]] / chosen : p[order[k]]);
  }
}

}  // namespace

ExpertMatrices read_expert(const ExpertSource& experts, int64_t layer, int64_t expert, DType dtype) {
  return {.gate = experts.place(layer, expert, ExpertMatrix::kGate).read(dtype),
          .up = experts.place(layer, expert, ExpertMatrix::kUp).read(dtype),
          .down = experts.place(layer, expert, ExpertMatrix::kDown).read(dtype)};
}

Tensor expert_hidden(const ExpertMatrices& expert, const Tensor& x) {
  const int64_t f = expert.gate.dim(0);
  const Tensor h = Tensor::empty({x.dim(0), 2 * f}, x.dtype()), a = Tensor::empty({x.dim(0), f}, x.dtype());
  run(Gemm{.a = x, .b = expert.gate, .c = h, .trans_b = true});
  run(Gemm{.a = x, .b = expert.up, .c = h, .trans_b = true, .c_column = f});
  run(SwiGlu{.h = h, .a = a});
  return a;
}

Tensor expert_output(const ExpertMatrices& expert, const Tensor& hidden) {
  const Tensor y = Tensor::empty({hidden.dim(0), expert.down.dim(0)}, hidden.dtype());
  run(Gemm{.a = hidden, .b = expert.down, .c = y, .trans_b = true});
  return y;
}

LayerSample layer_sample(const MethodInput& input, int64_t layer, int64_t limit) {
  const LayerStatistics& statistics = input.statistics.layers[static_cast<size_t>(layer)];
  const int64_t d = input.config.hidden_size, all = static_cast<int64_t>(statistics.sample_inputs.size()) / d;
  const auto slots = static_cast<size_t>(input.config.num_experts);
  const int64_t count = limit > 0 ? std::min(limit, all) : all;
  LayerSample sample{.x = Tensor::empty({count, d}, DType::kF32), .probs = {}, .slots = {}, .gates = {}};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = i * all / count;
    const float* x = statistics.sample_inputs.data() + t * d;
    std::copy(x, x + d, sample.x.data<float>() + i * d);
    route(statistics.sample_logits.data() + static_cast<size_t>(t) * slots, slots,
          static_cast<size_t>(input.config.num_experts_per_token), input.config.norm_topk_prob, sample);
  }
  return sample;
}

Tensor routed_rows(const LayerSample& sample, const std::vector<int32_t>& slots) {
  const int64_t d = sample.x.dim(1);
  const size_t top_k = sample.tokens() > 0 ? sample.slots.size() / static_cast<size_t>(sample.tokens()) : 0;
  std::vector<float> rows;
  for (int64_t t = 0; t < sample.tokens(); ++t) {
    const auto begin = sample.slots.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(t) * top_k);
    const bool chosen = std::any_of(begin, begin + static_cast<std::ptrdiff_t>(top_k), [&](int32_t slot) {
      return std::find(slots.begin(), slots.end(), slot) != slots.end();
    });
    const float* x = sample.x.data<float>() + t * d;
    if (chosen) rows.insert(rows.end(), x, x + d);
  }
  return Tensor::from(rows, {static_cast<int64_t>(rows.size()) / d, d});
}

std::vector<double> expert_products(const ExpertSource& experts, const OlmoeConfig& config,
                                    const std::vector<ExpertId>& list, ExpertMatrix matrix) {
  const std::vector<int64_t> shape = expert_matrix_shape(config, matrix);
  const auto n = static_cast<int64_t>(list.size());
  const Tensor sum = Tensor::zeros({n, n}, DType::kF64);
  for (int64_t first = 0; first < shape[0]; first += kRowsPerBlock) {
    const int64_t rows = std::min(kRowsPerBlock, shape[0] - first);
    const Tensor block = Tensor::empty({n, rows * shape[1]}, DType::kF64);
    for (int64_t i = 0; i < n; ++i) {
      const ExpertId& id = list[static_cast<size_t>(i)];
      experts.place(id.layer, id.expert, matrix).read_rows(first, block.row(i).reshape({rows, shape[1]}));
    }
    run(Gemm{.a = block, .b = block, .c = sum, .trans_b = true, .beta = 1});
  }
  return {sum.data<double>(), sum.data<double>() + n * n};
}

}  // namespace lightmoe
