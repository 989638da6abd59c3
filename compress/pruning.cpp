#include "compress/pruning.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "compress/expert_budget.h"
#include "compress/text.h"
#include "compress/weights.h"

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

namespace {

// Cosines of the rows of the layer's router, [E*E].
std::vector<double> router_row_cosines(const MethodInput& input, int64_t layer) {
  const auto slots = static_cast<size_t>(input.config.num_experts), d = static_cast<size_t>(input.config.hidden_size);
  std::vector<double> cosines(slots * slots, 0.0);
  if (input.experts == nullptr) return cosines;  // arithmetic only: the sizes are right
  const Tensor rows = input.experts->router(layer).read(DType::kF64);
  const double* w = rows.data<double>();
  const auto product = [&](size_t i, size_t j) {
    return std::inner_product(w + i * d, w + (i + 1) * d, w + j * d, 0.0);
  };
  for (size_t i = 0; i < slots; ++i) {
    for (size_t j = 0; j < slots; ++j) {
      const double norms = std::sqrt(product(i, i) * product(j, j));
      cosines[i * slots + j] = norms > 0 ? product(i, j) / norms : 0;
    }
  }
  return cosines;
}

}  // namespace

int64_t least_survivors(const MethodInput& input) {
  return input.options.redirect ? 1 : input.config.num_experts_per_token;
}

void apply_starved_policy(const MethodInput& input, int64_t layer, std::vector<double>& scores) {
  const StarvedPolicy policy = input.options.selection.starved;
  const std::vector<int32_t> without = starved_slots(input.statistics)[static_cast<size_t>(layer)];
  check(
      policy != StarvedPolicy::kError || without.empty(), ErrorKind::kNumeric,
      "layer {}: no calibration token reached experts {}; calibrate on more data, or say --starved keep or unimportant",
      layer, joined(without));
  if (policy != StarvedPolicy::kKeep) return;
  const size_t each = scores.size() / static_cast<size_t>(input.config.num_experts);  // scores of one expert
  for (const int32_t slot : without) {
    const auto first = scores.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(slot) * each);
    std::fill(first, first + static_cast<std::ptrdiff_t>(each), std::numeric_limits<double>::infinity());
  }
}

LayerPlan surviving_layer(const MethodInput& input, int64_t layer, const std::vector<int32_t>& kept) {
  const int64_t slots = input.config.num_experts;
  if (!input.options.redirect) return pruned_layer(slots, kept);
  std::vector<double> likeness = logit_similarity(input.statistics, layer);
  if (likeness.empty()) likeness = router_row_cosines(input, layer);
  std::vector<int32_t> survivors = kept;
  std::sort(survivors.begin(), survivors.end());
  std::vector<PlannedExpert> experts;
  for (const int32_t slot : survivors) experts.push_back({{slot}, {{slot}, {1.0}}});
  for (int32_t slot = 0; slot < slots; ++slot) {
    if (std::binary_search(survivors.begin(), survivors.end(), slot)) continue;
    const double* row = &likeness[static_cast<size_t>(slot * slots)];
    size_t best = 0;
    for (size_t i = 1; i < survivors.size(); ++i) {
      if (row[survivors[i]] > row[survivors[best]]) best = i;
    }
    experts[best].slots.push_back(slot);
  }
  return table_plan(slots, std::move(experts));
}

Plan plan_pruning(const MethodInput& input, const ScoreFunction& scores_of) {
  const auto kept = static_cast<size_t>(experts_per_layer(input, least_survivors(input)));
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    std::vector<double> scores = scores_of(l);
    apply_starved_policy(input, l, scores);
    std::vector<int32_t> order = by_descending_score(scores);
    order.resize(std::min(kept, order.size()));
    plan.layers.push_back(surviving_layer(input, l, order));
  }
  return plan;
}

}  // namespace lightmoe
