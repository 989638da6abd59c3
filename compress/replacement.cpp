#include "compress/replacement.h"

namespace lightmoe {

Plan plan_replacement(const MethodInput& input, int64_t bases, int64_t rank) {
  const ReplacementCost cost{.size = model_size(input.config), .bases = bases, .rank = rank};
  const int64_t target = target_parameters(input.options.budget, cost, input.bytes_per_parameter);
  const Selection selection = select_slots(input.statistics, input.options.selection, cost, target);
  Plan plan{.base_threshold = selection.base_threshold};
  for (size_t l = 0; l < selection.replaced.size(); ++l) {
    const std::vector<int32_t>& replaced = selection.replaced[l];
    std::vector<SlotGroup> groups;
    if (bases > 0 && !replaced.empty()) {
      groups = group_slots(replaced, gate_scores(input.statistics.layers[l]),
                           logit_similarity(input.statistics, static_cast<int64_t>(l)), bases);
    }
    plan.layers.push_back(replacement_plan(cost.size.slots, replaced, groups, rank));
    plan.layers.back().threshold = selection.thresholds[l];
  }
  return plan;
}

}  // namespace lightmoe
