#include "kernels/dispatch_plan.h"

#include <algorithm>

#include "kernels/device/simt.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

// Counting sort: counts of every bin in every chunk of consecutive (t, k), their running sums, then every (t, k) finds its own row.
// A bin is a position in slot_order (pairs) or, behind those, a group (visits). One warp owns a chunk and goes through it in order.
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kChunk = 512;
constexpr int kMaxSlots = 512, kMaxBins = 1024;

// Passed by value: small enough for the arguments of a launch, so that nothing is copied to the device before it.
struct Slots {
  int16_t position[kMaxSlots], group[kMaxSlots];
};
struct Sizes {
  int slots, positions, groups, top_k, total, chunks, visit_rows;  // total: T K
  DEVICE_FN int bins() const { return positions + groups; }
};

struct Bins {
  int slot_position[kMaxSlots], slot_group[kMaxSlots];
  int count[kWarps][kMaxBins];
};

DEVICE_FN void load_slots(const Slots& from, const Sizes& n, Bins& bins) {
  for (int s = static_cast<int>(threadIdx.x); s < n.slots; s += kThreads) {
    bins.slot_position[s] = from.position[s], bins.slot_group[s] = from.group[s];
  }
}

// The group of a visit that (t, k) opens, being the first of its token to choose it; -1 if it opens none.
DEVICE_FN int opened_group(const int32_t* slots, int index, int top_k, const Bins& bins) {
  const int own = bins.slot_group[slots[index]];
  for (int j = index - index % top_k; j < index; ++j) {
    if (bins.slot_group[slots[j]] == own) return -1;
  }
  return own;
}

DEVICE_FN int chunk_of_warp() { return static_cast<int>(blockIdx.x) * kWarps + warp_id(); }

// counts[bin, chunk]
__global__ void __launch_bounds__(kThreads)
    dispatch_count_kernel(const int32_t* slots, Slots table, Sizes n, int32_t* counts) {
  auto& bins = shared_memory<Bins>();
  int* count = bins.count[warp_id()];
  const int chunk = chunk_of_warp();
  load_slots(table, n, bins);
  for (int b = lane_id(); b < n.bins(); b += 32) count[b] = 0;
  for (int i = chunk * kChunk + lane_id(); i < std::min((chunk + 1) * kChunk, n.total); i += 32) {
    if (slots[i] < 0 || slots[i] >= n.slots) trap();
  }
  sync_block();
  for (int i = chunk * kChunk + lane_id(); i < std::min((chunk + 1) * kChunk, n.total); i += 32) {
    const int position = bins.slot_position[slots[i]], group = opened_group(slots, i, n.top_k, bins);
    if (position >= 0) atomic_add(&count[position], 1);
    if (group >= 0) atomic_add(&count[n.positions + group], 1);
  }
  sync_warp();
  for (int b = lane_id(); b < n.bins() && chunk < n.chunks; b += 32) counts[b * n.chunks + chunk] = count[b];
}

DEVICE_FN int warp_running_sum(int value) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = shuffle_up(value, distance);
    if (lane_id() >= distance) value += other;
  }
  return value;
}

// begin[i] = sum of the values before i, begin[count] = sum of all; one warp. The two may be the same array when it has count + 1.
DEVICE_FN void begins_of(const int32_t* values, int count, int32_t* begin) {
  int before = 0;
  for (int first = 0; first < count; first += 32) {
    const int i = first + lane_id(), own = i < count ? values[i] : 0, sum = warp_running_sum(own);
    if (i < count) begin[i] = before + sum - own;
    before += shuffle(sum, 31);
  }
  if (lane_id() == 0) begin[count] = before;
}

struct Offsets {
  int32_t *slot, *group, *pair_group;
};
struct Totals {
  int32_t slot[kMaxBins + 1], group[kMaxBins + 1];
  int first_position[kMaxBins + 1];  // of a group, in slot_order
};

// One block: counts[bin, chunk] become the number of the bin's elements in earlier chunks; offsets of all bins.
__global__ void __launch_bounds__(1024)
    dispatch_offsets_kernel(int32_t* counts, Slots table, Sizes n, Offsets offsets) {
  auto& totals = shared_memory<Totals>();
  for (int b = warp_id(); b < n.bins(); b += 32) {
    int32_t* row = counts + static_cast<int64_t>(b) * n.chunks;
    int before = 0;
    for (int first = 0; first < n.chunks; first += 32) {
      const int i = first + lane_id(), own = i < n.chunks ? row[i] : 0, sum = warp_running_sum(own);
      if (i < n.chunks) row[i] = before + sum - own;
      before += shuffle(sum, 31);
    }
    if (lane_id() == 0) (b < n.positions ? totals.slot[b] : totals.group[b - n.positions]) = before;
  }
  for (int g = static_cast<int>(threadIdx.x); g <= n.groups; g += 1024) {
    int before = 0;
    for (int s = 0; s < n.slots; ++s) before += table.group[s] >= 0 && table.group[s] < g ? 1 : 0;
    totals.first_position[g] = before;
  }
  sync_block();
  if (warp_id() == 0) begins_of(totals.slot, n.positions, totals.slot);
  if (warp_id() == 1) begins_of(totals.group, n.groups, totals.group);
  sync_block();
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i <= n.positions; i += 1024) offsets.slot[i] = totals.slot[i];
  for (int g = thread; g <= n.groups; g += 1024) {
    offsets.group[g] = totals.group[g];
    offsets.pair_group[g] = totals.slot[totals.first_position[g]];
  }
}

struct Lists {
  int32_t *pair_token, *pair_index, *pair_visit, *visit_token, *token_visit, *index_pair;
};

// The next free row of every lane's bin, in order of the lanes; -1 for lanes without bin.
DEVICE_FN int take_row(int bin, int* next) {
  const unsigned same = match_any(bin), earlier = same & ((1u << lane_id()) - 1);
  const int rank = std::popcount(earlier), row = bin >= 0 ? next[bin] + rank : -1;
  sync_warp();
  if (bin >= 0 && earlier == 0) next[bin] += std::popcount(same);
  sync_warp();
  return row;
}

// Rows of pairs and of the visits they open; opened[index] = that visit or -1.
__global__ void __launch_bounds__(kThreads)
    dispatch_place_kernel(const int32_t* slots, Slots table, Sizes n, const int32_t* counts, Offsets offsets,
                          Lists lists, int32_t* opened) {
  auto& bins = shared_memory<Bins>();
  int* next = bins.count[warp_id()];
  const int chunk = chunk_of_warp();
  load_slots(table, n, bins);
  for (int b = lane_id(); b < n.bins() && chunk < n.chunks; b += 32) {
    const int32_t begin = b < n.positions ? offsets.slot[b] : offsets.group[b - n.positions];
    next[b] = begin + counts[static_cast<int64_t>(b) * n.chunks + chunk];
  }
  sync_block();
  const int end = std::min((chunk + 1) * kChunk, n.total);
  for (int first = chunk * kChunk; first < end; first += 32) {
    const int i = first + lane_id();
    const int position = i < end ? bins.slot_position[slots[i]] : -1;
    const int group = i < end ? opened_group(slots, i, n.top_k, bins) : -1;
    const int pair = take_row(position, next), visit = take_row(group, next + n.positions);
    if (i >= end) continue;
    lists.index_pair[i] = pair;
    opened[i] = visit;
    if (pair >= 0) lists.pair_token[pair] = i / n.top_k, lists.pair_index[pair] = i;
    if (visit >= 0) lists.visit_token[visit] = i / n.top_k;
  }
}

// pair_visit and token_visit, which look at all visits of a token; -1 behind the last pair and the last visit.
__global__ void __launch_bounds__(256) dispatch_link_kernel(const int32_t* slots, Slots table, Sizes n,
                                                            const int32_t* opened, Offsets offsets, Lists lists) {
  const int i = static_cast<int>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
  if (i >= n.total) return;
  const int k = i % n.top_k, token = i - k, group = table.group[slots[i]];
  int visits = 0, before = 0, own = -1;
  for (int j = 0; j < n.top_k; ++j) {
    const bool opens = opened[token + j] >= 0;
    if (opens && table.group[slots[token + j]] == group) own = opened[token + j];
    if (j == k) before = visits;
    visits += opens ? 1 : 0;
  }
  if (opened[i] >= 0) lists.token_visit[token + before] = opened[i];
  if (k >= visits) lists.token_visit[i] = -1;
  if (group >= 0) lists.pair_visit[lists.index_pair[i]] = own;
  if (i >= offsets.slot[n.positions]) lists.pair_token[i] = lists.pair_index[i] = lists.pair_visit[i] = -1;
  if (i >= offsets.group[n.groups] && i < n.visit_rows) lists.visit_token[i] = -1;
}

Slots table_of(const FillDispatchPlan& op) {
  Slots table{};
  for (size_t s = 0; s < op.group_of_slot.size(); ++s) {
    table.position[s] = static_cast<int16_t>(op.position_of_slot[s]);
    table.group[s] = static_cast<int16_t>(op.group_of_slot[s]);
  }
  return table;
}

Tensor ints(const Shape& shape) { return Tensor::empty(shape, DType::kI32, kDevice); }

void fill_device(const FillDispatchPlan& op) {
  DispatchPlan& plan = op.plan;
  const int64_t tokens = op.slots.dim(0), top_k = op.slots.dim(1);
  const Sizes n{.slots = static_cast<int>(op.group_of_slot.size()),
                .positions = static_cast<int>(plan.slot_order.size()),
                .groups = static_cast<int>(op.num_groups),
                .top_k = static_cast<int>(top_k),
                .total = static_cast<int>(op.slots.numel()),
                .chunks = static_cast<int>(ceil_div(op.slots.numel(), kChunk)),
                .visit_rows = static_cast<int>(tokens * std::min(top_k, op.num_groups))};
  check(n.slots <= kMaxSlots && n.slots + n.groups <= kMaxBins, ErrorKind::kDevice,
        "dispatch_plan: {} slots and {} groups, on {} at most {} slots and {} together", n.slots, n.groups,
        name_of(kDevice), kMaxSlots, kMaxBins);
  const Slots table = table_of(op);
  plan.num_pairs = n.total, plan.num_visits = n.visit_rows;
  plan.pair_token = ints({n.total}), plan.pair_index = ints({n.total}), plan.pair_visit = ints({n.total});
  plan.visit_token = ints({n.visit_rows});
  plan.token_visit = ints(op.slots.shape()), plan.index_pair = ints(op.slots.shape());
  plan.slot_offsets = ints({n.positions + 1}), plan.group_offsets = ints({n.groups + 1});
  plan.pair_group_offsets = ints({n.groups + 1});
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor counts = ints({n.positions + n.groups, n.chunks}), opened = ints({n.total});
  const int32_t* slots = op.slots.data<int32_t>();
  const Offsets offsets{plan.slot_offsets.data<int32_t>(), plan.group_offsets.data<int32_t>(),
                        plan.pair_group_offsets.data<int32_t>()};
  const Lists lists{plan.pair_token.data<int32_t>(),  plan.pair_index.data<int32_t>(),
                    plan.pair_visit.data<int32_t>(),  plan.visit_token.data<int32_t>(),
                    plan.token_visit.data<int32_t>(), plan.index_pair.data<int32_t>()};
  const uint32_t blocks = static_cast<uint32_t>(ceil_div(n.chunks, kWarps));
  launch<dispatch_count_kernel>({.blocks = {blocks}, .threads = {kThreads}, .shared_bytes = sizeof(Bins)}, slots, table,
                                n, counts.data<int32_t>());
  launch<dispatch_offsets_kernel>({.blocks = {1}, .threads = {1024}, .shared_bytes = sizeof(Totals)},
                                  counts.data<int32_t>(), table, n, offsets);
  launch<dispatch_place_kernel>({.blocks = {blocks}, .threads = {kThreads}, .shared_bytes = sizeof(Bins)}, slots, table,
                                n, counts.data<int32_t>(), offsets, lists, opened.data<int32_t>());
  launch<dispatch_link_kernel>({.blocks = {static_cast<uint32_t>(ceil_div(n.total, 256))}, .threads = {256}}, slots,
                               table, n, opened.data<int32_t>(), offsets, lists);
}
const RegisterKernel<FillDispatchPlan> register_fill{kDevice, &fill_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
