#pragma once
// What the merging methods share: groups -> one stored expert each -> plan. They differ in how they group.
//   mean    W = sum_i w_i W_i, matrix by matrix
//   align   before it, hidden units of each member are permuted to the centre's (the first slot of the group): the assignment of
//           least cost on minus the inner products of gate rows, up rows and down columns (M-SMoE, arXiv 2310.01334). The
//           member's function does not change by it.
//   refit   after it, the down matrix is fitted again (MergeMoE, arXiv 2510.14436): with P the merged hidden activations and
//           Q = sum_i w_i f_i(x) on the sampled tokens routed to the group,  min ||P W^T - Q||^2 + lambda ||W - W_mean||^2.
//           Published: W = Q P^+, which needs some 36 tokens. Ours: the ridge towards the mean (lambda = 0.01 mean diag P^T P), so
//           that a group that few tokens reached keeps the mean.
// All slots of a group point to its expert; the router stays, gates add up. Groups of one keep their expert. The option --refit is for all
// of them, REAM and Diversify included.

#include <functional>

#include "compress/expert_sample.h"
#include "compress/selection.h"

namespace lightmoe {

struct MergeOptions {
  bool align = false, refit = false;
};
using GroupFunction = std::function<std::vector<SlotGroup>(int64_t layer)>;
// M-SMoE's (compress/merge_m_smoe.cpp): `total` groups in all layers, around the most used. The input must outlive it.
GroupFunction m_smoe_groups(const MethodInput& input, int64_t total);
Plan plan_merging(const MethodInput& input, const GroupFunction& groups, const MergeOptions& options);

// unit i of `to` is most like unit p[i] of `from`; the same expert with its units in that order.
std::vector<int32_t> aligned_units(const ExpertMatrices& to, const ExpertMatrices& from);
ExpertMatrices with_units(const ExpertMatrices& expert, const std::vector<int32_t>& order);
// The merged expert, f64.
ExpertMatrices merged_expert(const MethodInput& input, int64_t layer, const BankEntry& group,
                             const MergeOptions& options);

// Computes what `options` ask for of the layer's merged experts that are more than a weighted mean of several.
void compute_merged(Plan& plan, const MethodInput& input, int64_t layer, const MergeOptions& options);

// A group with weights proportional to how often its members are used, equal when none is.
SlotGroup group_by_use(const LayerStatistics& layer, const std::vector<int32_t>& slots);
// The `centres` most used slots, ties to the lower, each followed by the others for which its similarity ([E*E]) is the largest.
std::vector<SlotGroup> groups_around_most_used(const LayerStatistics& layer, const std::vector<double>& similarity,
                                               int64_t centres);

}  // namespace lightmoe
