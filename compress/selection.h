#pragma once
// Which slots are replaced, and which of them share a base: arXiv 2603.12645 sections 3.1 and 3.2, pure functions.
//   G_i  = sum_x g_i(x) / sum_j sum_x g_j(x)                                  normalised gate score of a layer
//   norm_j = mean ||router logits|| of layer j / mean over layers
//   p_j  = clip(p exp(-alpha (norm_j - 1)), (1 - clip) p, (1 + clip) p)       alpha 0.3, clip 0.2
//   replaced(j) = the shortest prefix of the layer's slots by ascending G whose cumulative G exceeds p_j
// p is found by bisection: the smallest whose model fits the target, so the budget is never exceeded.
// Ties go to the lower slot everywhere. Everything here is deterministic and in double.

#include <cstdint>
#include <string_view>
#include <vector>

#include "compress/budget.h"
#include "compress/statistics.h"

namespace lightmoe {

enum class SelectionRule : uint8_t {
  kAdaptive,  // the paper's: a threshold per layer
  kAverage,   // the same threshold for every layer
  kUniform,   // the same number of slots in every layer
};
// What G is made of. The paper's is the gate mass; the others are not in the paper.
enum class Importance : uint8_t {
  kGate,    // sum g
  kReap,    // mean of g ||f|| over the slot's tokens (arXiv 2510.13999)
  kTaylor,  // first-order change of the loss without the slot (compress/unit_gradients.h)
};
enum class StarvedPolicy : uint8_t {
  kUnimportant,  // no token: score 0, replaced first
  kKeep,         // never replaced
  kError,
};
SelectionRule parse_selection_rule(std::string_view name);  // Error(kUsage) listing the names
StarvedPolicy parse_starved_policy(std::string_view name);
Importance parse_importance(std::string_view name);
const char* name_of(Importance importance);

struct SelectionOptions {
  SelectionRule rule = SelectionRule::kAdaptive;
  double alpha = 0.3;
  double clip = 0.2;
  StarvedPolicy starved = StarvedPolicy::kUnimportant;
  Importance importance = Importance::kGate;
};

// G by another measure of importance: also sums to 1, uniform where all is 0.
std::vector<double> importance_scores(const LayerStatistics& layer, Importance importance);
std::vector<double> gate_scores(const LayerStatistics& layer);  // G, sums to 1; uniform when the layer saw nothing
std::vector<double> norm_factors(const Statistics& statistics);
double layer_threshold(double p, double norm, const SelectionOptions& options);

struct Selection {
  double base_threshold = 0;                   // p; 0 when nothing is replaced or the rule is uniform
  std::vector<double> thresholds;              // p_j
  std::vector<std::vector<int32_t>> replaced;  // per layer, ascending by G
};
// Error(kUsage) when even everything replaceable does not reach the target; Error(kNumeric) by StarvedPolicy::kError.
Selection select_slots(const Statistics& statistics, const SelectionOptions& options, const ReplacementCost& cost,
                       int64_t target_parameters);
// The selection of a given base threshold (the published ones, for example).
Selection select_by_threshold(const Statistics& statistics, const SelectionOptions& options,
                              const ReplacementCost& cost, double p);

// A group of replaced slots that share a base W = sum_i weights_i W_i.
struct SlotGroup {
  std::vector<int32_t> slots;   // the dominant first
  std::vector<double> weights;  // G_i / sum of the group's G (equal when that is 0)
};
// The `bases` slots of highest G among `replaced` are dominants; every other one joins the dominant with the largest
// similarity ([E*E], compress/statistics.h; empty: dealt out in turn).
std::vector<SlotGroup> group_slots(const std::vector<int32_t>& replaced, const std::vector<double>& scores,
                                   const std::vector<double>& similarity, int64_t bases);

}  // namespace lightmoe
