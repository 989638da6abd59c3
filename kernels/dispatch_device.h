#pragma once
// The device side of dispatch_plan.h: a counting sort. A BIN is a position in slot_order (pairs) or, behind those, a group (visits). Tokens
// are cut into chunks, which the router's blocks are, too: counts of every bin in every chunk, their running sums, then one warp goes
// through each chunk in order and finds every (t, k) its row. No sum depends on the order of threads.

#include "kernels/device/simt.h"
#include "kernels/dispatch_plan.h"

namespace lightmoe::LIGHTMOE_DEVICE {

constexpr int kDispatchTokens = 32;  // of a chunk
constexpr int kMaxDispatchSlots = 512, kMaxBins = 1024;

// Passed by value: small enough for the arguments of a launch, so that nothing is copied to the device before it.
struct DispatchSlots {
  int16_t position[kMaxDispatchSlots], group[kMaxDispatchSlots];
};
struct DispatchSizes {
  int slots, positions, groups, top_k, tokens, chunks, visit_rows;
  DEVICE_FN int bins() const { return positions + groups; }
  DEVICE_FN int total() const { return tokens * top_k; }
};
struct DispatchOffsets {
  int32_t *slot, *group, *pair_group;
};
struct DispatchLists {
  int32_t *pair_token, *pair_index, *pair_visit, *visit_token, *visit_index, *token_visit, *index_pair;
};
struct DispatchLaunch {
  DispatchSlots table;
  DispatchSizes n;
  int32_t* counts;  // [bin, chunk]; null when there is one chunk, whose block then makes the whole plan
  DispatchOffsets offsets;
  DispatchLists lists;
};

// Shared memory of a block with one chunk; `opened` goes on for top_k entries a token.
struct DispatchShared {
  int slot_position[kMaxDispatchSlots], slot_group[kMaxDispatchSlots];
  int count[kMaxBins];          // of the chunk; then the next free row of each bin
  int opened[kDispatchTokens];  // the visit that (t, k) opens, -1 if it opens none
};
constexpr size_t dispatch_shared_bytes(int64_t top_k) {
  return sizeof(DispatchShared) + sizeof(int) * kDispatchTokens * static_cast<size_t>(top_k - 1);
}

DEVICE_FN int warp_running_sum(int value) {
#pragma unroll
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

// The group of a visit that (t, k) opens, being the first of its token to choose it; -1 if it opens none.
DEVICE_FN int opened_group(const int32_t* slots, int index, int top_k, const DispatchShared& shared) {
  const int own = shared.slot_group[slots[index]];
  for (int j = index - index % top_k; j < index; ++j) {
    if (shared.slot_group[slots[j]] == own) return -1;
  }
  return own;
}

// Positions of slot_order before the group's.
DEVICE_FN int first_position(const DispatchSlots& table, int slots, int group) {
  int before = 0;
  for (int s = 0; s < slots; ++s) before += table.group[s] >= 0 && table.group[s] < group ? 1 : 0;
  return before;
}

DEVICE_FN int chunk_begin(const DispatchSizes& n, int chunk) { return chunk * kDispatchTokens * n.top_k; }
DEVICE_FN int chunk_end(const DispatchSizes& n, int chunk) {
  return std::min((chunk + 1) * kDispatchTokens, n.tokens) * n.top_k;
}

// The whole block: tables and the chunk's counts. A barrier stands at its end.
DEVICE_FN void dispatch_count(const DispatchSlots& table, const DispatchSizes& n, const int32_t* slots, int chunk,
                              DispatchShared& shared) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int s = thread; s < n.slots; s += threads) {
    shared.slot_position[s] = table.position[s], shared.slot_group[s] = table.group[s];
  }
  for (int b = thread; b < n.bins(); b += threads) shared.count[b] = 0;
  for (int i = chunk_begin(n, chunk) + thread; i < chunk_end(n, chunk); i += threads) {
    if (slots[i] < 0 || slots[i] >= n.slots) trap();
  }
  sync_block();
  for (int i = chunk_begin(n, chunk) + thread; i < chunk_end(n, chunk); i += threads) {
    const int position = shared.slot_position[slots[i]], group = opened_group(slots, i, n.top_k, shared);
    if (position >= 0) atomic_add(&shared.count[position], 1);
    if (group >= 0) atomic_add(&shared.count[n.positions + group], 1);
  }
  sync_block();
}

// One warp, of the only chunk's counts.
DEVICE_FN void dispatch_offsets(const DispatchSlots& table, const DispatchSizes& n, const DispatchOffsets& offsets,
                                const DispatchShared& shared) {
  begins_of(shared.count, n.positions, offsets.slot);
  begins_of(shared.count + n.positions, n.groups, offsets.group);
  sync_warp();
  for (int g = lane_id(); g <= n.groups; g += 32)
    offsets.pair_group[g] = offsets.slot[first_position(table, n.slots, g)];
}

// The next free row of every lane's bin, in order of the lanes; -1 for lanes without bin.
DEVICE_FN int take_row(int bin, int* next) {
  const unsigned same = match_any(bin), earlier = same & ((1u << lane_id()) - 1);
  const int rank = std::popcount(earlier), row = bin >= 0 ? next[bin] + rank : -1;
  sync_warp();
  if (bin >= 0 && earlier == 0) next[bin] += std::popcount(same);
  sync_warp();
  return row;
}

// pair_visit and token_visit, which look at all visits of a token; -1 behind the last pair and the last visit.
DEVICE_FN void dispatch_link(const DispatchSizes& n, const int32_t* slots, const DispatchOffsets& offsets,
                             const DispatchLists& lists, const DispatchShared& shared, int begin, int i) {
  const int k = i % n.top_k, token = i - k, group = shared.slot_group[slots[i]];
  int visits = 0, before = 0, own = -1;
  for (int j = 0; j < n.top_k; ++j) {
    const int opened = shared.opened[token + j - begin];
    if (opened >= 0 && shared.slot_group[slots[token + j]] == group) own = opened;
    if (j == k) before = visits;
    visits += opened >= 0 ? 1 : 0;
  }
  const int opened = shared.opened[i - begin];
  if (opened >= 0) lists.token_visit[token + before] = opened;
  if (k >= visits) lists.token_visit[i] = -1;
  if (group >= 0) lists.pair_visit[lists.index_pair[i]] = own;
  if (i >= offsets.slot[n.positions]) lists.pair_token[i] = lists.pair_index[i] = lists.pair_visit[i] = -1;
  if (i >= offsets.group[n.groups] && i < n.visit_rows) lists.visit_token[i] = lists.visit_index[i] = -1;
}

// One warp: rows of the chunk's pairs and of the visits they open. before: elements of a bin in earlier chunks, stride apart (null: none).
DEVICE_FN void dispatch_place(const DispatchSizes& n, const int32_t* slots, int chunk, const DispatchOffsets& offsets,
                              const int32_t* before, int stride, const DispatchLists& lists, DispatchShared& shared) {
  for (int b = lane_id(); b < n.bins(); b += 32) {
    const int32_t begin = b < n.positions ? offsets.slot[b] : offsets.group[b - n.positions];
    shared.count[b] = begin + (before != nullptr ? before[static_cast<int64_t>(b) * stride] : 0);
  }
  sync_warp();
  const int begin = chunk_begin(n, chunk), end = chunk_end(n, chunk);
  for (int first = begin; first < end; first += 32) {
    const int i = first + lane_id();
    const int position = i < end ? shared.slot_position[slots[i]] : -1;
    const int group = i < end ? opened_group(slots, i, n.top_k, shared) : -1;
    const int pair = take_row(position, shared.count), visit = take_row(group, shared.count + n.positions);
    if (i >= end) continue;
    lists.index_pair[i] = pair;
    shared.opened[i - begin] = visit;
    if (pair >= 0) lists.pair_token[pair] = i / n.top_k, lists.pair_index[pair] = i;
    if (visit >= 0) lists.visit_token[visit] = i / n.top_k, lists.visit_index[visit] = i;
  }
  sync_warp();
  for (int i = begin + lane_id(); i < end; i += 32) dispatch_link(n, slots, offsets, lists, shared, begin, i);
}

// The plan's tensors, allocated, as a launch; keeps `counts` in scratch.
DispatchLaunch dispatch_launch(const FillDispatchPlan& op, Tensor& counts);
void fill_sorted(const FillDispatchPlan& op, DispatchSort sort);  // dispatch_sorted.cu
// What follows the counts where there are several chunks.
void finish_dispatch(const DispatchLaunch& launch, const int32_t* slots);

}  // namespace lightmoe::LIGHTMOE_DEVICE
