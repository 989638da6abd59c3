// REAP, router-weighted expert activation pruning (arXiv 2510.13999; code CerebrasResearch/reap): S_j = mean of g_j(x) ||f_j(x)||
// over the tokens routed to j; the lowest n per layer go, with their router rows.
// Published: the score, uniform counts, rows deleted. Our reading: gates not renormalised over the top K for OLMoE, as the model does;
// masking the logits before the softmax equals deleting the rows. Changed: "super experts" are not exempted.

#include "compress/expert_scores.h"
#include "compress/pruning.h"

namespace lightmoe {
namespace {

Plan plan(const MethodInput& input) {
  return plan_pruning(input, [&](int64_t layer) {
    return expert_scores(input.statistics.layers[static_cast<size_t>(layer)], {.mean = 1, .gate = 1, .norm = 1});
  });
}

const RegisterMethod method{{.name = "reap",
                             .summary = "prune by the mean of gate times output norm",
                             .paper = "2510.13999",
                             .slots = "removed",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kSums,
                             .train_free = true,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
