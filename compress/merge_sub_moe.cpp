// Sub-MoE (arXiv 2506.23266): experts cluster by their mean outputs and merge in a common subspace.
//   k-means++ by cosine of the mean outputs over all tokens;  in a cluster one SVD [W_1 | .. | W_n] = U S [V_1^T | .. | V_n^T], the V blocks
//   averaged by use, W = U S sum_i w_i V_i^T.
// Published (notes; no official code): the above, with an option to allocate clusters over two layers together. Our reading: all singular
// values are kept. Then  U S sum_i w_i V_i^T = sum_i w_i (U S V_i^T) = sum_i w_i W_i  exactly: the subspace merge IS the mean weighted by
// use (tested), and that is how it is computed here. The method's content is its clustering. Changed: layers are allocated alike.

#include "compress/clustering.h"
#include "compress/expert_budget.h"
#include "compress/merging.h"

namespace lightmoe {
namespace {

Plan plan(const MethodInput& input) {
  const int64_t clusters = experts_per_layer(input, 1), slots = input.config.num_experts;
  return plan_merging(input,
                      [&](int64_t l) {
                        const LayerStatistics& layer = input.statistics.layers[static_cast<size_t>(l)];
                        std::vector<double> features = layer.all_output;
                        if (features.empty()) features.assign(static_cast<size_t>(slots), 1.0);  // arithmetic only
                        std::vector<SlotGroup> groups;
                        for (const auto& cluster :
                             cosine_kmeans(features, slots, clusters, input.options.seed + static_cast<uint64_t>(l))) {
                          groups.push_back(group_by_use(layer, cluster));
                        }
                        return groups;
                      },
                      {.refit = input.options.refit});
}

const RegisterMethod method{{.name = "sub-moe",
                             .summary = "k-means of the experts' mean outputs by cosine, averaged by use",
                             .paper = "2506.23266",
                             .slots = "shared",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kAllOutputs,
                             .train_free = true,
                             .compresses = true,
                             .merges = true}};

}  // namespace
}  // namespace lightmoe
