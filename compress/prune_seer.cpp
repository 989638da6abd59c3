// SEER-MoE (arXiv 2404.05089), the soft count: S_j = sum of the gates of j over the tokens that chose it; this is also the
// importance that LightMoE replaces by.
// Published: the score, and fine-tuning with an entropy penalty on the gates so that fewer experts can be chosen. Our reading: gates as
// the model gives them. Changed: recovery is the common one (LoRA); the entropy penalty and the smaller K are not part of this.

#include "compress/expert_scores.h"
#include "compress/pruning.h"

namespace lightmoe {
namespace {

Plan plan(const MethodInput& input) {
  return plan_pruning(input, [&](int64_t layer) {
    return expert_scores(input.statistics.layers[static_cast<size_t>(layer)], {.mean = 0, .gate = 1, .norm = 0});
  });
}

const RegisterMethod method{{.name = "seer",
                             .summary = "prune the experts of the least gate mass (soft count)",
                             .paper = "2404.05089",
                             .slots = "removed",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kSums,
                             .train_free = true,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
