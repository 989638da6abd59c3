// "Replace, 1 shared" of arXiv 2603.12645, table 1: one base per layer, replaced at once; the rank makes up for the fewer bases.

#include "compress/replacement.h"

namespace lightmoe {
namespace {

int64_t rank_of(const MethodInput& input) { return matched_rank(input, 1); }
Plan plan_replace_one(const MethodInput& input) { return plan_replacement(input, 1, rank_of(input)); }

const RegisterMethod method{{.name = "replace-one",
                             .summary = "one shared base per layer, replaced at once",
                             .paper = "2603.12645",
                             .slots = "shared, adapter",
                             .plan = &plan_replace_one,
                             .rank = &rank_of,
                             .trainable = Trainable::kBasesAndAdapters,
                             .needs = Needs::kSums,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
