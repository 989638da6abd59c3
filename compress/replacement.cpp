#include "compress/replacement.h"

#include "compress/merging.h"
#include "compress/rank_allocation.h"
#include "compress/residuals.h"

namespace lightmoe {
namespace {

// Bases as means of aligned members (compress/merging.h).
void align_bases(Plan& plan, const MethodInput& input) {
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const auto layer = static_cast<int64_t>(l);
    for (const int32_t entry : plan.layers[l].bases) {
      const BankEntry group = plan.layers[l].bank[static_cast<size_t>(entry)];
      if (group.experts.size() < 2) continue;
      compute_expert(plan, layer, entry,
                     [input, layer, group] { return merged_expert(input, layer, group, {.align = true}); });
    }
  }
}

}  // namespace

Plan plan_replacement(const MethodInput& input, int64_t bases, int64_t rank) {
  const ReplacementCost cost{.size = model_size(input.config), .bases = bases, .rank = rank};
  const int64_t target = target_parameters(input.options.budget, cost, input.bytes_per_parameter);
  const Selection selection = select_slots(input.statistics, input.options.selection, cost, target);
  Plan plan{.base_threshold = selection.base_threshold};
  for (size_t l = 0; l < selection.replaced.size(); ++l) {
    const std::vector<int32_t>& replaced = selection.replaced[l];
    std::vector<SlotGroup> groups;
    if (bases > 0 && !replaced.empty()) {
      groups = group_slots(replaced, importance_scores(input.statistics.layers[l], input.options.selection.importance),
                           logit_similarity(input.statistics, static_cast<int64_t>(l)), bases);
    }
    plan.layers.push_back(replacement_plan(cost.size.slots, replaced, groups, rank));
    plan.layers.back().threshold = selection.thresholds[l];
  }
  if (input.experts == nullptr) return plan;  // sizes are what they will be
  const MethodOptions& options = input.options;
  const bool whitened = options.adapter_init == AdapterInit::kWhitenedSvd;
  check(!whitened || !input.statistics.layers.front().sample_inputs.empty(), ErrorKind::kUsage,
        "--adapter-init svd-whitened needs a sample of inputs: give --stats with a file of `lightmoe calibrate "
        "--sample-inputs`");
  check(options.selection.importance != Importance::kTaylor || !input.statistics.layers.front().taylor.empty(),
        ErrorKind::kUsage,
        "--importance taylor needs gradients: give --stats with a file of `lightmoe calibrate --unit-gradients`");
  if (options.rank_allocation == RankAllocation::kEnergy) allocate_ranks(plan, input, rank);
  if (options.align) align_bases(plan, input);
  // Plain factors of plain bases are made while they are written (compress/compressor.cpp).
  if (whitened || (options.align && options.adapter_init == AdapterInit::kSvd))
    add_residual_adapters(plan, input, whitened);
  return plan;
}

}  // namespace lightmoe
