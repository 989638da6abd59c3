// HC-SMoE (arXiv 2410.08589; code wazenmai/HC-SMoE): experts that say the same on average are merged.
//   o_i = mean output of expert i over ALL tokens;  agglomerative clustering of the o_i, Euclidean distance, average linkage, to the same
//   number of clusters in every layer;  merged W = mean weighted by how often the members are chosen;  no alignment of units.
// Published: all of it. Our reading: counts over the model's own top K (the code has top 2 written in one place). Changed: nothing.
// hc-smoe-refit adds MergeMoE's refit of the down matrices, as --refit does.

#include "compress/clustering.h"
#include "compress/expert_budget.h"
#include "compress/merging.h"

namespace lightmoe {
namespace {

Plan plan(const MethodInput& input, const MergeOptions& options) {
  const int64_t clusters = experts_per_layer(input, 1), slots = input.config.num_experts;
  return plan_merging(
      input,
      [&](int64_t l) {
        const LayerStatistics& layer = input.statistics.layers[static_cast<size_t>(l)];
        std::vector<double> features = layer.all_output;
        if (features.empty()) features.assign(static_cast<size_t>(slots), 0.0);  // arithmetic only
        std::vector<SlotGroup> groups;
        for (const auto& cluster : average_linkage(euclidean_distances(features, slots), slots, clusters)) {
          groups.push_back(group_by_use(layer, cluster));
        }
        return groups;
      },
      options);
}
Plan plan_hc_smoe(const MethodInput& input) { return plan(input, {.refit = input.options.refit}); }
Plan plan_refit(const MethodInput& input) { return plan(input, {.refit = true}); }

const RegisterMethod method{{.name = "hc-smoe",
                             .summary = "hierarchical clusters of the experts' mean outputs, averaged by use",
                             .paper = "2410.08589",
                             .slots = "shared",
                             .plan = &plan_hc_smoe,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kAllOutputs,
                             .train_free = true,
                             .compresses = true,
                             .merges = true}};
const RegisterMethod refit{{.name = "hc-smoe-refit",
                            .summary = "HC-SMoE with MergeMoE's refit of the down matrices",
                            .paper = "2410.08589",
                            .slots = "shared",
                            .plan = &plan_refit,
                            .trainable = Trainable::kAdapters,
                            .needs = Needs::kBoth,
                            .train_free = true,
                            .compresses = true,
                            .merges = true}};

}  // namespace
}  // namespace lightmoe
