// LightMoE without training, which the paper (arXiv 2603.12645) does not have: the same slots, groups, bases and ranks, but the low-rank terms
// start as what the replaced experts differ from their base by, instead of B = 0.
//   lightmoe-free            best rank-R approximation of original - base (the same as --adapter-init svd)
//   lightmoe-free-w          for the inputs that occur (compress/residuals.h); D2-MoE's factorisation on LightMoE's selection and groups
// Ours. Recovery trains bases and terms, as LightMoE does, replaced at once.

#include "compress/replacement.h"
#include "compress/residuals.h"

namespace lightmoe {
namespace {

int64_t rank_of(const MethodInput& input) {
  return input.options.method_rank > 0 ? input.options.method_rank : input.options.rank;
}

Plan plan_free(const MethodInput& input, bool whitened) {
  Plan plan = plan_replacement(input, input.options.bases, rank_of(input));
  add_residual_adapters(plan, input, whitened);
  return plan;
}
Plan plan_plain(const MethodInput& input) { return plan_free(input, false); }
Plan plan_whitened(const MethodInput& input) { return plan_free(input, true); }

const RegisterMethod plain{{.name = "lightmoe-free",
                            .summary = "LightMoE's bases with the SVD of what they miss: no training (ours)",
                            .paper = "2603.12645",
                            .slots = "shared, adapter",
                            .plan = &plan_plain,
                            .rank = &rank_of,
                            .trainable = Trainable::kBasesAndAdapters,
                            .needs = Needs::kSums,
                            .train_free = true,
                            .compresses = true}};
const RegisterMethod whitened{{.name = "lightmoe-free-w",
                               .summary = "the same, factorised for the inputs that occur (ours)",
                               .paper = "2603.12645",
                               .slots = "shared, adapter",
                               .plan = &plan_whitened,
                               .rank = &rank_of,
                               .trainable = Trainable::kBasesAndAdapters,
                               .needs = Needs::kInputs,
                               .train_free = true,
                               .compresses = true}};

}  // namespace
}  // namespace lightmoe
