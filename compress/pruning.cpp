#include "compress/pruning.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "compress/expert_budget.h"
#include "compress/text.h"

namespace lightmoe {

std::vector<int32_t> by_descending_score(const std::vector<double>& scores) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const auto score = [&](int32_t slot) { return scores[static_cast<size_t>(slot)]; };
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return score(a) != score(b) ? score(a) > score(b) : a > b; });
  return order;
}

LayerPlan pruned_layer(int64_t num_slots, const std::vector<int32_t>& kept) {
  std::vector<PlannedExpert> experts;
  for (const int32_t slot : kept) experts.push_back({{slot}, {{slot}, {1.0}}});
  return table_plan(num_slots, std::move(experts));
}

Plan plan_pruning(const MethodInput& input, const ScoreFunction& scores_of) {
  const auto kept = static_cast<size_t>(experts_per_layer(input, input.config.num_experts_per_token));
  const StarvedPolicy policy = input.options.selection.starved;
  const auto starved = starved_slots(input.statistics);
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    const std::vector<int32_t>& without = starved[static_cast<size_t>(l)];
    check(policy != StarvedPolicy::kError || without.empty(), ErrorKind::kNumeric,
          "layer {}: no calibration token reached experts {}; calibrate on more data, or say --starved keep or "
          "unimportant",
          l, joined(without));
    std::vector<double> scores = scores_of(l);
    if (policy == StarvedPolicy::kKeep) {
      for (const int32_t slot : without) scores[static_cast<size_t>(slot)] = std::numeric_limits<double>::infinity();
    }
    std::vector<int32_t> order = by_descending_score(scores);
    order.resize(std::min(kept, order.size()));
    plan.layers.push_back(pruned_layer(input.config.num_experts, order));
  }
  return plan;
}

}  // namespace lightmoe
