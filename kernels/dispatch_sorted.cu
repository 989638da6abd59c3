// dispatch_plan.h by sorting keys, the counting sort's sibling: pairs by their position, visits by their group, with the project's radix
// sort (kernels/stable_order.cu) or, on a GPU, with CUB's. The same plan, in more launches.

#include "kernels/device/stable_order.h"
#include "kernels/dispatch_device.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 256;

// Of (t, k) = i: its position, and the group of a visit that it opens; -1 without.
__global__ void __launch_bounds__(kThreads)
    dispatch_keys_kernel(const __grid_constant__ DispatchLaunch p, const int32_t* slots, int32_t* position,
                         int32_t* opens) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= p.n.total()) return;
  if (slots[i] < 0 || slots[i] >= p.n.slots) trap();
  const int group = p.table.group[slots[i]];
  bool first = group >= 0;
  for (int j = i - i % p.n.top_k; j < i; ++j) first = first && p.table.group[slots[j]] != group;
  position[i] = p.table.position[slots[i]];
  opens[i] = first ? group : -1;
}

// Row r of the lists; opened[t, k]: the visit it opens, or -1.
__global__ void __launch_bounds__(kThreads)
    dispatch_rows_kernel(const __grid_constant__ DispatchLaunch p, const int32_t* pair_order,
                         const int32_t* visit_order, int32_t* opened) {
  const int r = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (r <= p.n.groups) p.offsets.pair_group[r] = p.offsets.slot[first_position(p.table, p.n.slots, r)];
  if (r >= p.n.total()) return;
  const bool is_pair = r < p.offsets.slot[p.n.positions], is_visit = r < p.offsets.group[p.n.groups];
  const int pair = pair_order[r], visit = visit_order[r];
  p.lists.pair_token[r] = is_pair ? pair / p.n.top_k : -1;
  p.lists.pair_index[r] = is_pair ? pair : -1;
  p.lists.index_pair[pair] = is_pair ? r : -1;
  opened[visit] = is_visit ? r : -1;
  if (r < p.n.visit_rows) {
    p.lists.visit_token[r] = is_visit ? visit / p.n.top_k : -1;
    p.lists.visit_index[r] = is_visit ? visit : -1;
  }
}

// pair_visit and token_visit, which look at all visits of a token.
__global__ void __launch_bounds__(kThreads)
    dispatch_visits_kernel(const __grid_constant__ DispatchLaunch p, const int32_t* slots, const int32_t* opened) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= p.n.total()) return;
  const int k = i % p.n.top_k, token = i - k, group = p.table.group[slots[i]];
  int visits = 0, before = 0, own = -1;
  for (int j = 0; j < p.n.top_k; ++j) {
    const int visit = opened[token + j];
    if (visit >= 0 && p.table.group[slots[token + j]] == group) own = visit;
    if (j == k) before = visits;
    visits += visit >= 0 ? 1 : 0;
  }
  if (opened[i] >= 0) p.lists.token_visit[token + before] = opened[i];
  if (k >= visits) p.lists.token_visit[i] = -1;
  if (group >= 0) p.lists.pair_visit[p.lists.index_pair[i]] = own;
  if (i >= p.offsets.slot[p.n.positions]) p.lists.pair_visit[i] = -1;
}

Tensor sorted(const Tensor& keys, int64_t num_keys, DispatchSort sort) {
#if defined(__CUDACC__)
  if (sort == DispatchSort::kCub) return stable_order_cub(keys, num_keys);
#endif
  check(sort != DispatchSort::kCub, ErrorKind::kDevice, "dispatch sort cub: on cuda only, not on {}", name_of(kDevice));
  return stable_order(keys, num_keys);
}

}  // namespace

void fill_sorted(const FillDispatchPlan& op, DispatchSort sort) {
  Tensor counts;
  DispatchLaunch p = dispatch_launch(op, counts);
  const int32_t* slots = op.slots.data<int32_t>();
  const MemoryScope scope(MemoryCategory::kScratch);
  const auto ints = [&] { return Tensor::empty({op.slots.numel()}, DType::kI32, kDevice); };
  const Tensor position = ints(), opens = ints(), opened = ints();
  const auto blocks = [](int64_t count) { return static_cast<uint32_t>(ceil_div(count, kThreads)); };
  const Launch config{.blocks = {blocks(op.slots.numel())}, .threads = {kThreads}};
  launch<dispatch_keys_kernel>(config, p, slots, position.data<int32_t>(), opens.data<int32_t>());
  const Tensor pairs = sorted(position, p.n.positions, sort), visits = sorted(opens, p.n.groups, sort);
  op.plan.slot_offsets = group_begins(position, pairs, p.n.positions);
  op.plan.group_offsets = group_begins(opens, visits, p.n.groups);
  p.offsets.slot = op.plan.slot_offsets.data<int32_t>(), p.offsets.group = op.plan.group_offsets.data<int32_t>();
  launch<dispatch_rows_kernel>(
      {.blocks = {blocks(std::max<int64_t>(op.slots.numel(), p.n.groups + 1))}, .threads = {kThreads}}, p,
      pairs.data<int32_t>(), visits.data<int32_t>(), opened.data<int32_t>());
  launch<dispatch_visits_kernel>(config, p, slots, opened.data<int32_t>());
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
