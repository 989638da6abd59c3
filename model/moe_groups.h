#pragma once
// What the slots of a layer point to during one pass. A GROUP is one pair of matrices that rows are multiplied with: a bank entry,
// or an annealed slot (its own blend of two experts), or a latent slot (its down matrix where it has one; the rest comes
// from model/moe_latent.h). A LANE is what a slot computes: group and adapter; slots of one lane are
// merged before dispatch (kernels/merge_slots.h). Groups are numbered bank entries first, then latents, then annealed slots.
// Constant and removed slots have no group.

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/dispatch_plan.h"
#include "model/moe.h"

namespace lightmoe {

struct MoeGroup {
  Expert bank;      // null matrices: W = 0, or of a latent
  Expert original;  // annealed slot: W = beta original + (1-beta) bank; null else
  bool annealed() const { return original.gate_up != nullptr; }
};

struct MoeGroups {
  std::vector<MoeGroup> groups;
  std::vector<int32_t> group_of_slot;    // E + 1 entries: the last slot number means "dropped"
  std::vector<int32_t> adapter_of_slot;  // E, -1 = none
  std::vector<int32_t> lane_of_slot;     // E; empty when every slot is a lane of its own
  bool shared = false;                   // some group has several lanes: its visits are not its pairs
  double beta = 0;                       // of the annealed groups

  // base_once false: every lane is a group of its own.
  explicit MoeGroups(const MoeLayer& layer, bool base_once = true);
};

// Whether the plan has rows for a group. Where the host cannot look without waiting for the device, every group counts as having
// rows: an empty one costs nothing there.
bool has_rows(const DispatchPlan& plan, size_t group);

enum class ExpertHalf : uint8_t { kGateUp, kDown };
const ParameterPtr& half_of(const Expert& expert, ExpertHalf half);

// Matrices for a grouped product, one entry per group, in as many calls of `use` as it takes: first what is stored, then the blends of
// annealed slots, made in scratch a few at a time (a layer of OLMoE 1B-7B that anneals 40 slots has 670 MB of them). Each group
// is defined in one call at most, and in none where W = 0 or no row asks.
void use_group_weights(const MoeGroups& groups, const DispatchPlan& plan, ExpertHalf half, DType activation,
                       const std::function<void(const std::vector<Tensor>&)>& use);
// Whether some group has rows but no matrix, so that a product leaves rows unwritten.
bool has_zero_rows(const MoeGroups& groups, const DispatchPlan& plan);
bool any_trainable(const MoeGroups& groups, ExpertHalf half);
bool any_trainable(const MoeLayer& layer);

}  // namespace lightmoe
