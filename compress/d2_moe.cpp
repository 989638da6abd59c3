// D2-MoE (arXiv 2502.17298; code lliai/D2MoE): one base per layer, and what each expert differs from it by as a low-rank term.
//   W_base = weighted mean of the layer's experts, matrix by matrix;  Delta_i = W_i - W_base;  with L L^T = Gram of the inputs of that matrix
//   for expert i (ridge 0.01), SVD of Delta_i L truncated to rank R:  B = U sqrt(S), A = sqrt(S) V^T L^{-1}
// Published: base weights from Fisher information times frequency (mean, frequency, RegMean as options), whitened SVD, and a base
// pruned further while running. Our reading: weights = share of use; R = the largest that the budget allows, the same for all experts
// and matrices. Changed: the base is not pruned at run time; Gram matrices come from the token sample. The terms are most of the model, so
// recovery trains the bases and as many kinds of the terms' factors as come nearest to what LightMoE trains.
// Every slot is base + adapter, so the base runs once per token (model/moe.h).

#include <algorithm>
#include <numeric>

#include "compress/budget.h"
#include "compress/residuals.h"

namespace lightmoe {
namespace {

int64_t rank_for(const MethodInput& input) {
  const ModelSize size = model_size(input.config);
  const ReplacementCost cost{.size = size, .bases = 1, .rank = 0};
  const int64_t allowed = allowed_parameters(input.options.budget, cost, input.bytes_per_parameter);
  if (allowed >= size.total()) return 0;
  const int64_t fixed = size.rest + size.layers * size.expert, unit = size.layers * size.slots * size.adapter_unit;
  check(allowed >= fixed + unit, ErrorKind::kUsage,
        "{} is impossible for d2-moe: a base per layer and rank 1 for every expert are {:.1f} M parameters ({:.1f} % "
        "removed, {:.3f} GiB), but at most {:.1f} M are allowed; ask for less",
        describe(input.options.budget), static_cast<double>(fixed + unit) * 1e-6,
        100 * (1 - static_cast<double>(fixed + unit) / static_cast<double>(size.total())),
        static_cast<double>(fixed + unit) * input.bytes_per_parameter * 0x1p-30, static_cast<double>(allowed) * 1e-6);
  return std::min((allowed - fixed) / unit, std::min(size.hidden, size.width));
}

Plan plan_d2(const MethodInput& input) {
  const int64_t rank = rank_for(input);
  if (rank == 0) return plain_plan(model_size(input.config));
  const auto slots = static_cast<int32_t>(input.config.num_experts);
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    std::vector<int32_t> all(static_cast<size_t>(slots));
    std::iota(all.begin(), all.end(), 0);
    const std::vector<double>& use = input.statistics.layers[static_cast<size_t>(l)].count;
    const double sum = std::accumulate(use.begin(), use.end(), 0.0);
    BankEntry base{.experts = all, .weights = {}};
    for (const double n : use) base.weights.push_back(sum > 0 ? n / sum : 1.0 / slots);
    LayerPlan layer = table_plan(slots, {{all, base}});
    for (int32_t s = 0; s < slots; ++s) {
      layer.shape.slots[static_cast<size_t>(s)].adapter = s;
      layer.shape.adapter_rank.push_back(rank);
      layer.adapter_slot.push_back(s);
    }
    plan.layers.push_back(std::move(layer));
  }
  add_residual_adapters(plan, input, true);
  return plan;
}

const RegisterMethod method{{.name = "d2-moe",
                             .summary = "one base per layer and a whitened low-rank term for every expert",
                             .paper = "2502.17298",
                             .slots = "shared, adapter",
                             .plan = &plan_d2,
                             .trainable = Trainable::kBasesAndFactors,
                             .needs = Needs::kInputs,
                             .train_free = true,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
