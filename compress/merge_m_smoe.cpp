// M-SMoE (arXiv 2310.01334; code UNITES-Lab/MC-SMoE): experts gather around the most used ones and are averaged.
//   1. usage = how often a slot is chosen, divided by the layer's largest; one ranking over all layers decides how many groups each
//      layer keeps, so that busy layers keep fewer;  2. the most used of a layer are the centres;  3. every other slot joins the centre
//      with the largest cosine of router logits (mean over sampled sequences);  4. hidden units are aligned, then averaged by usage.
// Published: 1-4; the code ties the slots of a group and keeps all router rows, as here. Our reading: at least one group a layer. Changed:
// units are aligned to the group's centre (the code: to expert 0 of the layer); MC-SMoE's
// second step is compress/mc_smoe.cpp.

#include "compress/expert_budget.h"
#include "compress/merging.h"

namespace lightmoe {
namespace {

Plan plan(const MethodInput& input, const MergeOptions& options) {
  return plan_merging(input, m_smoe_groups(input, experts_in_all(input, 1)), options);
}
Plan plan_m_smoe(const MethodInput& input) { return plan(input, {.align = true, .refit = input.options.refit}); }
Plan plan_refit(const MethodInput& input) { return plan(input, {.align = true, .refit = true}); }

const RegisterMethod method{
    {.name = "m-smoe",
     .summary = "average experts around the most used ones, grouped by router logits, units aligned",
     .paper = "2310.01334",
     .slots = "shared",
     .plan = &plan_m_smoe,
     .trainable = Trainable::kAdapters,
     .needs = Needs::kSums,
     .train_free = true,
     .compresses = true,
     .merges = true}};
const RegisterMethod refit{{.name = "m-smoe-refit",
                            .summary = "M-SMoE with MergeMoE's refit of the down matrices",
                            .paper = "2310.01334",
                            .slots = "shared",
                            .plan = &plan_refit,
                            .trainable = Trainable::kAdapters,
                            .needs = Needs::kInputs,
                            .train_free = true,
                            .compresses = true,
                            .merges = true}};

}  // namespace
}  // namespace lightmoe
