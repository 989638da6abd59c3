#pragma once
// What the pruning methods share: scores -> slots removed -> plan. They differ in the score alone.
// The same number of experts goes in every layer, those of the lowest score, ties the lower slot first; the router's rows stay in
// the file and are masked before the softmax, so that survivors' gates grow as if the rows had been deleted (softmax runs before the
// choice and OLMoE does not renormalise). With --starved keep, experts without calibration tokens stay.
// With --redirect nothing is masked: a removed slot is pointed to the survivor most like it, whose gate grows by the removed slot's
// (the redirection of HodgeCover, arXiv 2605.13997, whose selection of survivors is not used here). Most like: the largest mean cosine
// of router logits over the calibration's token sample, without a sample the cosine of the router's rows (our reading; ties: the
// lower slot). One expert per layer may then be left, for all slots can still be chosen.

#include <functional>

#include "compress/expert_scores.h"
#include "compress/registry.h"

namespace lightmoe {

// [E] of one layer, higher = more worth keeping.
using ScoreFunction = std::function<std::vector<double>(int64_t layer)>;
Plan plan_pruning(const MethodInput& input, const ScoreFunction& scores);

// A method whose score is one of the family over the calibration's sums (compress/expert_scores.h): all that its file says.
template <ScoreExponents kScore>
Method prune_by_score(std::string name, std::string summary, std::string paper) {
  const auto plan = [](const MethodInput& input) {
    return plan_pruning(input, [&](int64_t layer) {
      return expert_scores(input.statistics.layers[static_cast<size_t>(layer)], kScore);
    });
  };
  return {.name = std::move(name),
          .summary = std::move(summary),
          .paper = std::move(paper),
          .slots = "removed",
          .plan = plan,
          .trainable = Trainable::kAdapters,
          .needs = Needs::kSums,
          .train_free = true,
          .compresses = true,
          .redirects = true};
}

// Fewest experts a layer may keep: K, or one where removed slots are redirected.
int64_t least_survivors(const MethodInput& input);
// Infinite scores for starved experts under --starved keep; Error(kNumeric) naming them under error.
void apply_starved_policy(const MethodInput& input, int64_t layer, std::vector<double>& scores);
// The layer with these experts alone, its other slots masked or redirected.
LayerPlan surviving_layer(const MethodInput& input, int64_t layer, const std::vector<int32_t>& kept);

// Slots by descending score, ties the higher slot first (the lower one goes first).
std::vector<int32_t> by_descending_score(const std::vector<double>& scores);
// The layer with these slots alone.
LayerPlan pruned_layer(int64_t num_slots, const std::vector<int32_t>& kept);

}  // namespace lightmoe
