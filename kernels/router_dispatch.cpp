#include "kernels/router_dispatch.h"

namespace lightmoe {

DispatchPlan run_router_dispatch(const Router& router, const std::vector<int32_t>& group_of_slot, int64_t num_groups) {
  const bool counts = dispatch_sort() == DispatchSort::kCounting && router.x.dim(0) > 0;
  if (!counts || !has_kernel<RouterDispatch>(router.x.device())) {
    run(router);
    return make_dispatch_plan(router.slots, group_of_slot, num_groups);
  }
  check_router(router);
  require(router.w.dim(0) <= std::ssize(group_of_slot), "router_dispatch: {} slots, groups of {}", router.w.dim(0),
          group_of_slot.size());
  DispatchPlan plan;
  const FillDispatchPlan fill = begin_dispatch_plan(router.slots, group_of_slot, num_groups, plan);
  dispatch(RouterDispatch{.router = router, .fill = fill}, router.x.device(), "router_dispatch");
  return plan;
}

}  // namespace lightmoe
