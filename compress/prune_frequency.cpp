// Frequency pruning: S_j = number of tokens whose top K hold j. The oldest baseline (heavy hitters, hard count, of SEER-MoE,
// arXiv 2404.05089; "Frequency" in the tables of arXiv 2510.13999 and 2605.29350).
// Published: the score and removing per layer. Our reading: the same number per layer. Changed: nothing.

#include "compress/expert_scores.h"
#include "compress/pruning.h"

namespace lightmoe {
namespace {

Plan plan(const MethodInput& input) {
  return plan_pruning(input, [&](int64_t layer) {
    return expert_scores(input.statistics.layers[static_cast<size_t>(layer)], {.mean = 0, .gate = 0, .norm = 0});
  });
}

const RegisterMethod method{{.name = "frequency",
                             .summary = "prune the experts that the fewest tokens choose",
                             .paper = "2404.05089",
                             .slots = "removed",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kSums,
                             .train_free = true,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
