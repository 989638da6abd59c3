// MoNE, mixture of novices and experts (arXiv 2507.00390; code zxgx/mode-pd): an expert that goes leaves its mean output behind.
//   per expert, over the tokens routed to it:  c = mean output,  v = elementwise variance of the output,  s = sum of gates / all tokens
//   score = (w ||sqrt(v)||_2) ((1-w) s), w = 1/2;  the lowest of each layer become the constant c, still chosen by the unchanged
//   router and multiplied by its gate.
// Published: the above ("fusion"; each factor alone is an option of the code). Our reading: uniform counts; the constants count towards
// the budget. Changed: ties by slot number instead of a strict threshold. An expert without tokens leaves the constant zero.

#include <algorithm>
#include <cmath>

#include "compress/budget.h"
#include "compress/expert_budget.h"
#include "compress/pruning.h"

namespace lightmoe {
namespace {

std::vector<double> scores(const LayerStatistics& layer, int64_t hidden, int64_t tokens) {
  const auto d = static_cast<size_t>(hidden);
  std::vector<double> out;
  for (size_t e = 0; e < layer.count.size(); ++e) {
    double variance = 0;
    for (size_t i = 0; i < d && layer.count[e] > 0 && !layer.routed_output2.empty(); ++i) {
      const double mean = layer.routed_output[e * d + i] / layer.count[e];
      variance += std::max(0.0, layer.routed_output2[e * d + i] / layer.count[e] - mean * mean);
    }
    out.push_back(.5 * std::sqrt(variance) * .5 * layer.gate_mass[e] / static_cast<double>(tokens));
  }
  return out;
}

// Experts per layer so that they and a constant for each of the others fit.
int64_t experts_beside_constants(const MethodInput& input) {
  const ModelSize size = model_size(input.config);
  const int64_t whole = experts_in_all(input, 1) / size.layers;  // without constants
  if (whole == size.slots || input.options.budget.kind == BudgetKind::kExpertsPerLayer) return whole;
  const ReplacementCost cost{.size = size, .bases = 1, .rank = 0};
  const int64_t allowed = allowed_parameters(input.options.budget, cost, input.bytes_per_parameter);
  int64_t kept = whole;
  while (kept > 1 && size.rest + size.layers * (kept * size.expert + (size.slots - kept) * size.hidden) > allowed)
    --kept;
  return kept;
}

Plan plan(const MethodInput& input) {
  const auto kept = static_cast<size_t>(experts_beside_constants(input));
  const int64_t slots = input.config.num_experts, d = input.config.hidden_size;
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    const LayerStatistics& layer = input.statistics.layers[static_cast<size_t>(l)];
    std::vector<int32_t> order = by_descending_score(scores(layer, d, input.statistics.tokens));
    order.resize(kept);
    LayerPlan made = pruned_layer(slots, order);
    if (!made.replaced.empty()) {
      std::vector<double> table;
      for (Slot& slot : made.shape.slots) {
        if (slot.kind != SlotKind::kRemoved) continue;
        const auto s = static_cast<size_t>(&slot - made.shape.slots.data());
        slot = {.kind = SlotKind::kConstant, .constant = static_cast<int32_t>(made.shape.constants++)};
        for (size_t i = 0; i < static_cast<size_t>(d); ++i) {
          table.push_back(layer.count[s] > 0 ? layer.routed_output[s * static_cast<size_t>(d) + i] / layer.count[s]
                                             : 0);
        }
      }
      plan.computed[constants_tensor_name(l)] = [table, rows = made.shape.constants, d] {
        return Tensor::from(table, {rows, d});
      };
    }
    plan.layers.push_back(std::move(made));
  }
  return plan;
}

const RegisterMethod method{{.name = "mone",
                             .summary = "experts of small gate and variance become their mean output",
                             .paper = "2507.00390",
                             .slots = "constant",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kSums,
                             .train_free = true,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
