#include <algorithm>

#include "kernels/dispatch_device.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

// A block of one warp for each chunk. One chunk alone: the whole plan.
__global__ void __launch_bounds__(32)
    dispatch_count_kernel(const __grid_constant__ DispatchLaunch p, const int32_t* slots) {
  auto& shared = shared_memory<DispatchShared>();
  const int chunk = static_cast<int>(blockIdx.x);
  dispatch_count(p.table, p.n, slots, chunk, shared);
  if (p.counts == nullptr) {
    dispatch_offsets(p.table, p.n, p.offsets, shared);
    sync_warp();
    dispatch_place(p.n, slots, 0, p.offsets, nullptr, 0, p.lists, shared);
    return;
  }
  for (int b = lane_id(); b < p.n.bins(); b += 32) {
    p.counts[static_cast<int64_t>(b) * p.n.chunks + chunk] = shared.count[b];
  }
}

struct Totals {
  int32_t slot[kMaxBins + 1], group[kMaxBins + 1];
};

// One block: counts[bin, chunk] become the number of the bin's elements in earlier chunks; offsets of all bins.
__global__ void __launch_bounds__(1024) dispatch_offsets_kernel(const __grid_constant__ DispatchLaunch p) {
  auto& totals = shared_memory<Totals>();
  const DispatchSizes& n = p.n;
  for (int b = warp_id(); b < n.bins(); b += 32) {
    int32_t* row = p.counts + static_cast<int64_t>(b) * n.chunks;
    int before = 0;
    for (int first = 0; first < n.chunks; first += 32) {
      const int i = first + lane_id(), own = i < n.chunks ? row[i] : 0, sum = warp_running_sum(own);
      if (i < n.chunks) row[i] = before + sum - own;
      before += shuffle(sum, 31);
    }
    if (lane_id() == 0) (b < n.positions ? totals.slot[b] : totals.group[b - n.positions]) = before;
  }
  sync_block();
  if (warp_id() == 0) begins_of(totals.slot, n.positions, totals.slot);
  if (warp_id() == 1) begins_of(totals.group, n.groups, totals.group);
  sync_block();
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i <= n.positions; i += 1024) p.offsets.slot[i] = totals.slot[i];
  for (int g = thread; g <= n.groups; g += 1024) {
    p.offsets.group[g] = totals.group[g];
    p.offsets.pair_group[g] = totals.slot[first_position(p.table, n.slots, g)];
  }
}

__global__ void __launch_bounds__(32)
    dispatch_place_kernel(const __grid_constant__ DispatchLaunch p, const int32_t* slots) {
  auto& shared = shared_memory<DispatchShared>();
  const int chunk = static_cast<int>(blockIdx.x);
  for (int s = lane_id(); s < p.n.slots; s += 32) {
    shared.slot_position[s] = p.table.position[s], shared.slot_group[s] = p.table.group[s];
  }
  dispatch_place(p.n, slots, chunk, p.offsets, p.counts + chunk, p.n.chunks, p.lists, shared);
}

Tensor ints(const Shape& shape) { return Tensor::empty(shape, DType::kI32, kDevice); }

}  // namespace

DispatchLaunch dispatch_launch(const FillDispatchPlan& op, Tensor& counts) {
  DispatchPlan& plan = op.plan;
  const int64_t tokens = op.slots.dim(0), top_k = op.slots.dim(1);
  const int64_t slots = std::ssize(op.group_of_slot), bins = std::ssize(plan.slot_order) + op.num_groups;
  check(slots <= kMaxDispatchSlots && slots + op.num_groups <= kMaxBins, ErrorKind::kDevice,
        "dispatch_plan: {} slots and {} groups, on {} at most {} slots and {} together", slots, op.num_groups,
        name_of(kDevice), kMaxDispatchSlots, kMaxBins);
  DispatchLaunch p{};
  p.n = {.slots = static_cast<int>(slots),
         .positions = static_cast<int>(plan.slot_order.size()),
         .groups = static_cast<int>(op.num_groups),
         .top_k = static_cast<int>(top_k),
         .tokens = static_cast<int>(tokens),
         .chunks = static_cast<int>(ceil_div(tokens, kDispatchTokens)),
         .visit_rows = static_cast<int>(tokens * std::min(top_k, op.num_groups))};
  for (size_t s = 0; s < op.group_of_slot.size(); ++s) {
    p.table.position[s] = static_cast<int16_t>(op.position_of_slot[s]);
    p.table.group[s] = static_cast<int16_t>(op.group_of_slot[s]);
  }
  const int64_t pairs = op.slots.numel();
  plan.num_pairs = pairs, plan.num_visits = p.n.visit_rows;
  plan.pair_token = ints({pairs}), plan.pair_index = ints({pairs}), plan.pair_visit = ints({pairs});
  plan.visit_token = ints({p.n.visit_rows}), plan.visit_index = ints({p.n.visit_rows});
  plan.token_visit = ints(op.slots.shape()), plan.index_pair = ints(op.slots.shape());
  plan.slot_offsets = ints({p.n.positions + 1}), plan.group_offsets = ints({p.n.groups + 1});
  plan.pair_group_offsets = ints({p.n.groups + 1});
  p.offsets = {plan.slot_offsets.data<int32_t>(), plan.group_offsets.data<int32_t>(),
               plan.pair_group_offsets.data<int32_t>()};
  p.lists = {plan.pair_token.data<int32_t>(),  plan.pair_index.data<int32_t>(),  plan.pair_visit.data<int32_t>(),
             plan.visit_token.data<int32_t>(), plan.visit_index.data<int32_t>(), plan.token_visit.data<int32_t>(),
             plan.index_pair.data<int32_t>()};
  if (p.n.chunks > 1) {
    const MemoryScope scope(MemoryCategory::kScratch);
    counts = ints({bins, p.n.chunks});
    p.counts = counts.data<int32_t>();
  }
  return p;
}

void finish_dispatch(const DispatchLaunch& p, const int32_t* slots) {
  if (p.counts == nullptr) return;
  launch<dispatch_offsets_kernel>({.blocks = {1}, .threads = {1024}, .shared_bytes = sizeof(Totals)}, p);
  launch<dispatch_place_kernel>({.blocks = {static_cast<uint32_t>(p.n.chunks)},
                                 .threads = {32},
                                 .shared_bytes = dispatch_shared_bytes(p.n.top_k)},
                                p, slots);
}

namespace {

void fill_device(const FillDispatchPlan& op) {
  if (dispatch_sort() != DispatchSort::kCounting) return fill_sorted(op, dispatch_sort());
  Tensor counts;
  const DispatchLaunch p = dispatch_launch(op, counts);
  const auto blocks = static_cast<uint32_t>(std::max(1, p.n.chunks));  // without tokens there are still offsets
  launch<dispatch_count_kernel>({.blocks = {blocks}, .threads = {32}, .shared_bytes = dispatch_shared_bytes(p.n.top_k)},
                                p, op.slots.data<int32_t>());
  finish_dispatch(p, op.slots.data<int32_t>());
}
const RegisterKernel<FillDispatchPlan> register_fill{kDevice, &fill_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
