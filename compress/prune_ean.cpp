// EAN, expert activation norm (the score family of arXiv 2606.15716; ean_sum in the code of REAP, CerebrasResearch/reap):
// S_j = sum of ||f_j(x)|| over the tokens routed to j.  Published: the score. Changed: nothing.

#include "compress/expert_scores.h"
#include "compress/pruning.h"

namespace lightmoe {
namespace {

Plan plan(const MethodInput& input) {
  return plan_pruning(input, [&](int64_t layer) {
    return expert_scores(input.statistics.layers[static_cast<size_t>(layer)], {.mean = 0, .gate = 0, .norm = 1});
  });
}

const RegisterMethod method{{.name = "ean",
                             .summary = "prune by the summed norm of the experts' outputs",
                             .paper = "2606.15716",
                             .slots = "removed",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kSums,
                             .train_free = true,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
