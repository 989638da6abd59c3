#pragma once
// From the router's choice to row lists for grouped products, by counting sort (stable: ties in order of token, then k).
// A PAIR is one (token t, k) with its slot; a VISIT is one distinct (token, group), where group = group_of_slot[slot] is what the
// slot points to (a stored expert). Several slots of a token that share a group make one visit: "a stored expert runs once per token".
//   pairs sorted by (group, slot, t, k):  pair_token [P], pair_index [P] (= t*K + k), slot_offsets [slot_order.size()+1],
//   pair_visit [P], visits sorted by (group, t): visit_token [V], visit_index [V] (t*K + k of its first pair in order of k),
//   group_offsets [G+1], pair_group_offsets [G+1].
//   token_visit [T,K]: the visits of token t, each once, -1 for the rest;  index_pair [T,K]: pair of (t,k), -1 if dropped.
// A slot with group_of_slot = -1 has no expert (constant, removed): its pairs are dropped, index_pair = -1.
// Slots are numbered 0..E-1; slot_order lists the slots by (group, slot), those without group left out, so that slot_order[s] owns
//   pairs [slot_offsets[s], slot_offsets[s+1]) with s < slot_order.size().
// shapes: slots i32 [T,K]; all outputs i32, where slots lies. 0 pairs and 0 visits are legal. Deterministic. Bytes: about 28 T K.
// cpu: num_pairs = P and num_visits = V exactly.
// sim, cuda: the host never waits for the device, so num_pairs = T K and num_visits = T min(K, G) are upper bounds: the lists have
//   that many rows, those from P (from V) on hold -1, and P, V are the last of slot_offsets and group_offsets, in device memory. Where
//   every slot has a group P = T K. So rows of pair or visit tensors behind the last group belong to nobody: grouped products, which
//   take their rows from the offsets, never touch them, row-wise ops may compute on whatever they hold, and who follows
//   pair_token, pair_index, pair_visit, visit_token or visit_index skips -1. token_visit and index_pair are the same on every device.

#include <vector>

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct DispatchPlan {
  int64_t num_pairs = 0, num_visits = 0;  // rows of the lists
  std::vector<int32_t> slot_order;        // slots that own pairs, by (group, slot)
  std::vector<int32_t>
      group_positions;  // G+1: group g owns the positions [group_positions[g], group_positions[g+1]) of slot_order
  Tensor pair_token, pair_index, pair_visit, slot_offsets, pair_group_offsets;
  Tensor visit_token, visit_index, group_offsets;
  Tensor token_visit, index_pair;
};
// group_of_slot has one entry per slot, each in [-1, num_groups). Throws Error(kInternal) on a slot out of range (sim, cuda: the kernel
// traps, an Error(kDevice); at most 512 slots with 1024 groups and slots together).
DispatchPlan make_dispatch_plan(const Tensor& slots, const std::vector<int32_t>& group_of_slot, int64_t num_groups);

// How sim and cuda sort: counting (the default; with the router, in its kernel), by the project's radix sort, or (cuda) by CUB's. The plan is
// the same. For the process.
enum class DispatchSort : uint8_t { kCounting, kRadix, kCub };
void set_dispatch_sort(DispatchSort sort);
DispatchSort dispatch_sort();

// What make_dispatch_plan dispatches, checked and with what follows from the groups alone made: fills the rest of the plan.
struct FillDispatchPlan {
  Tensor slots;
  std::vector<int32_t> group_of_slot, position_of_slot;  // position in slot_order, -1 without group
  int64_t num_groups;
  DispatchPlan& plan;
};
FillDispatchPlan begin_dispatch_plan(const Tensor& slots, const std::vector<int32_t>& group_of_slot, int64_t num_groups,
                                     DispatchPlan& plan);

}  // namespace lightmoe
