// MSAN, mean squared activation norm (the score family of arXiv 2606.15716): S_j = mean of ||f_j(x)||^2 over the tokens routed to j.
// Published: the score. Changed: nothing.

#include "compress/expert_scores.h"
#include "compress/pruning.h"

namespace lightmoe {
namespace {

Plan plan(const MethodInput& input) {
  return plan_pruning(input, [&](int64_t layer) {
    return expert_scores(input.statistics.layers[static_cast<size_t>(layer)], {.mean = 1, .gate = 0, .norm = 2});
  });
}

const RegisterMethod method{{.name = "msan",
                             .summary = "prune by the mean squared norm of the experts' outputs",
                             .paper = "2606.15716",
                             .slots = "removed",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kSums,
                             .train_free = true,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
