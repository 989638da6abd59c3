#pragma once
// Slots that compute the same function (one stored expert, no adapter) chosen together by a token become one choice whose gate is
// the sum:  for k in order, lane = lane_of_slot[slots[t,k]]; if an earlier j of token t has this lane,
//   merged_gates[t,j] += gates[t,k], merged_slots[t,k] = E (dropped), merged_gates[t,k] = 0, first[t,k] = j;
//   else merged_slots[t,k] = lane, merged_gates[t,k] = gates[t,k], first[t,k] = k.
// A slot E in `slots` (a choice that is not to be evaluated) stays dropped: merged_slots = E, merged_gates = 0, first = k.
// backward: dgates[t,k] = dmerged[t, first[t,k]].
// lane_of_slot i32 [E]: the lowest slot that computes the same. make_dispatch_plan then takes E + 1 slots, the last without expert.
// shapes: slots, merged_slots, first i32 [T,K]; gates, merged_gates, dgates, dmerged [T,K] f32 or f64.  All written with '='; no aliasing.

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct MergeSlots {
  Tensor slots, gates, lane_of_slot;
  Tensor merged_slots, merged_gates, first;
};
struct MergeSlotsBackward {
  Tensor dmerged, first;
  Tensor dgates;
};
void run(const MergeSlots& op);
void run(const MergeSlotsBackward& op);

}  // namespace lightmoe
