#pragma once
// The router (kernels/router.h) and the dispatch plan of what it chose (kernels/dispatch_plan.h) in one pass, with the results of the two
// after each other. On devices the router's blocks, which have the tokens' choices at hand, count the slots and groups too, so that two
// kernels are left to follow; a block that has all tokens (32 or fewer, as in decoding) makes the whole plan. The CPU does the two.

#include "kernels/dispatch_plan.h"
#include "kernels/router.h"

namespace lightmoe {

// Writes router's outputs and returns the plan of router.slots.
DispatchPlan run_router_dispatch(const Router& router, const std::vector<int32_t>& group_of_slot, int64_t num_groups);

// What it dispatches, checked.
struct RouterDispatch {
  const Router& router;
  const FillDispatchPlan& fill;
};

}  // namespace lightmoe
