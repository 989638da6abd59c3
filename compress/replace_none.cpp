// "Replace w/o shared" of arXiv 2603.12645, table 1: a replaced slot keeps its low-rank term alone, W_share = 0.
// NOTE: with W = 0 and B = 0 in all three matrices every gradient of such a slot is zero for ever (each is a product with one of
// the other B); compress/adapter.h therefore starts B of gate and up with random values here, and B of down with zero.

#include "compress/replacement.h"

namespace lightmoe {
namespace {

int64_t rank_of(const MethodInput& input) { return matched_rank(input, 0); }
Plan plan_replace_none(const MethodInput& input) { return plan_replacement(input, 0, rank_of(input)); }

const RegisterMethod method{{.name = "replace-none",
                             .summary = "no shared base: replaced experts become low-rank terms alone",
                             .paper = "2603.12645",
                             .slots = "adapter",
                             .plan = &plan_replace_none,
                             .rank = &rank_of,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kSums,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
