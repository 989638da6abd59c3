// LightMoE, expert replacing (arXiv 2603.12645): the least important slots share M bases per layer, gate-weighted means of the
// experts they replace, each with a private low-rank term; the swap happens gradually while the task is trained.

#include "compress/replacement.h"

namespace lightmoe {
namespace {

int64_t rank_of(const MethodInput& input) {
  return input.options.method_rank > 0 ? input.options.method_rank : input.options.rank;
}

Plan plan_lightmoe(const MethodInput& input) { return plan_replacement(input, input.options.bases, rank_of(input)); }

const RegisterMethod annealed{{.name = "lightmoe",
                               .summary = "shared bases and low-rank terms, replaced gradually",
                               .paper = "2603.12645",
                               .slots = "shared, adapter",
                               .plan = &plan_lightmoe,
                               .rank = &rank_of,
                               .trainable = Trainable::kBasesAndAdapters,
                               .needs = Needs::kSums,
                               .anneal = 0.2,
                               .compresses = true,
                               .featured = true}};
const RegisterMethod direct{{.name = "lightmoe-direct",
                             .summary = "LightMoE, replaced at once (eps = 0)",
                             .paper = "2603.12645",
                             .slots = "shared, adapter",
                             .plan = &plan_lightmoe,
                             .rank = &rank_of,
                             .trainable = Trainable::kBasesAndAdapters,
                             .needs = Needs::kSums,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
