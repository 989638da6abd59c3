#pragma once
// The device side of adapter_chain.h. A block owns kVisits consecutive visits of one group (or kVisits tokens), and goes over the group's slots:
// within a slot, pairs are in order of their visits and tokens, so those of a tile are one range, found by bisection. Pairs of one slot
// are of different visits; a warp owns columns, so sums over the slots of a visit need neither atomics nor barriers and have one order.

#include "kernels/adapter_chain.h"
#include "kernels/device/strip_product.h"
#include "kernels/device/vector.h"

namespace lightmoe::LIGHTMOE_DEVICE {

constexpr int kTileRows = 64, kTileColumns = 64;  // visits or tokens; columns of F a block works on at a time
constexpr int kTileWarps = 4, kTileThreads = 32 * kTileWarps;
constexpr int kMaxRank = static_cast<int>(kMaxAdapterRank), kMaxSlots = static_cast<int>(kMaxChainSlots);
constexpr int kPad = 8;        // elements; rows of operands then start in different banks
constexpr int kFragments = 2;  // of 8 columns that a warp owns in a chunk: kTileColumns / kTileWarps / 8

// The plan and the adapters as a kernel's parameter.
struct ChainPlan {
  const int32_t *pair_visit, *pair_index, *slot_offsets, *group_offsets;
  const float* gates;
  int groups, width, rank_stride;     // rank_stride: the largest rank; rows of u and du have twice as many columns
  int chunks_of_part;                 // chunks of kTileColumns of F that one block goes over
  bool pairs_together;                // two elements of h0, s, ds, dh0 in one access
  bool ranks_aligned, width_aligned;  // rows of B, of A_down in accesses of 16 bytes
  int64_t num_pairs;
  uint32_t done[kMaxSlots / 32];  // bits of groups that are left alone
  int16_t group_positions[kMaxSlots + 1], rank[kMaxSlots];
  const void *b_gate[kMaxSlots], *b_up[kMaxSlots], *a_down[kMaxSlots];
};

inline void check_chain_sizes(const char* op, const DispatchPlan& plan) {
  check(plan.slot_order.size() <= kMaxChainSlots && plan.group_positions.size() <= kMaxChainSlots + 1,
        ErrorKind::kDevice, "{}: {} slots in {} groups, on {} at most {} each", op, plan.slot_order.size(),
        plan.group_positions.size() - 1, name_of(kDevice), kMaxChainSlots);
}
ChainPlan chain_plan(const DispatchPlan& plan, const AdapterMatrices& adapters, const Tensor& h0, const Tensor& gates,
                     const std::vector<uint8_t>& done);
DType type_of(const AdapterMatrices& adapters);  // f32 where there are none
// Shares F between blocks and returns in how many parts.
int parts_of(ChainPlan& p, uint32_t tiles);
// What blocks summed over their part of F, [parts, P, columns], in order of the parts, times the pairs' gates unless null.
void add_parts(const DispatchPlan& plan, const ChainPlan& chain, const Tensor& parts, const float* gates,
               const Tensor& out);
void add_gate_parts(const ChainPlan& p, const Tensor& parts, const Tensor& dgates);

DEVICE_FN bool is_done(const ChainPlan& p, int group) { return (p.done[group / 32] >> group % 32 & 1) != 0; }

// A tile of a group's rows: visits [first, first + count).
struct GroupTile {
  int group, first, count;
};
// Tile `index` of tiles of kTileRows rows, groups one after the other; count 0 behind the last. All lanes of a warp must call.
DEVICE_FN GroupTile find_group_tile(const ChainPlan& p, int index) {
  int before = 0;
  for (int group = lane_id(); group - lane_id() < p.groups; group += 32) {
    const bool asked = group < p.groups && !is_done(p, group);
    const int begin = asked ? p.group_offsets[group] : 0, end = asked ? p.group_offsets[group + 1] : 0;
    const int tiles = ceil_div(end - begin, kTileRows);
    int through = tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = shuffle_up(through, distance);
      if (lane_id() >= distance) through += other;
    }
    through += before;
    const int owner = reduce_add(index >= through ? 1 : 0);
    if (owner < 32) {
      const int first = begin + (index - (through - tiles)) * kTileRows, left = std::min(end - first, int{kTileRows});
      return {group - lane_id() + owner, shuffle(first, owner), shuffle(left, owner)};
    }
    before = shuffle(through, 31);
  }
  return {0, 0, 0};
}
inline uint32_t group_tiles(int64_t rows, int64_t groups) {
  return static_cast<uint32_t>(rows / kTileRows + std::min(rows, groups));
}

// The first of [begin, end) whose key is at least `key`; keys ascend.
DEVICE_FN int first_at_least(const int32_t* keys, int begin, int end, int key) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (keys[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Pairs of each slot of [first_slot, last_slot) that fall in the tile's rows, keys being their visits or tokens.
struct SlotRanges {
  int begin[kMaxSlots], end[kMaxSlots];
};
DEVICE_FN void find_ranges(SlotRanges& ranges, const int32_t* keys, const int32_t* slot_offsets, int first_slot,
                           int last_slot, int first, int count) {
  for (int s = first_slot + static_cast<int>(threadIdx.x); s < last_slot; s += kTileThreads) {
    ranges.begin[s] = first_at_least(keys, slot_offsets[s], slot_offsets[s + 1], first);
    ranges.end[s] = first_at_least(keys, ranges.begin[s], slot_offsets[s + 1], first + count);
  }
}

// to[r][c] = from[r, c] for rows x columns of a matrix, zeros up to padded_rows x padded_columns (a multiple of 8); the whole block.
struct PartSize {
  int rows, columns, padded_rows, padded_columns;
};
template <class E, class W>
DEVICE_FN void load_part(E* to, int stride, const W* from, int64_t from_stride, const PartSize& n, bool aligned) {
  const int across = n.padded_columns / 8;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < n.padded_rows * across; i += kTileThreads) {
    const int row = i / across, column = i % across * 8;
    const auto values = load_floats<8>(from + row * from_stride, column, row < n.rows ? n.columns : 0, aligned);
    store_floats<8>(to + row * stride, column, n.padded_columns, true, values);
  }
}
DEVICE_FN int pad_16(int value) { return (value + 15) / 16 * 16; }

// Where the pairs of a strip lie.
struct StripPairs {
  int visit[kStripRows];  // within the tile, -1 behind the last pair
  float gate[kStripRows];
};
DEVICE_FN void load_strip(StripPairs& strip, const ChainPlan& p, int first_visit, int pair, int end) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kStripRows) return;
  const bool present = pair + i < end;
  strip.visit[i] = present ? p.pair_visit[pair + i] - first_visit : -1;
  strip.gate[i] = present ? p.gates[p.pair_index[pair + i]] : 0.0f;
}
// Rows of u (columns [0, rank) to 0.., [rank, 2 rank) to kMaxRank..) or, without halves, of e.
template <class E>
DEVICE_FN void load_strip_rows(E* to, int stride, const E* from, int from_stride, int rank, bool halves, int pair,
                               int end) {
  const int padded = pad_16(rank), columns = halves ? 2 * padded : padded;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < kStripRows * columns; i += kTileThreads) {
    const int row = i / columns, column = i % columns, half = column >= padded ? 1 : 0, r = column - half * padded;
    const bool present = pair + row < end && r < rank;
    to[row * stride + half * kMaxRank + r] =
        present ? from[static_cast<int64_t>(pair + row) * from_stride + half * rank + r] : from_float<E>(0);
  }
}

// Two neighbouring elements, of which the first `count` exist.
template <class T>
struct alignas(2 * sizeof(T)) ElementPair {
  T first, second;
};
template <class T>
DEVICE_FN void load_two(float (&values)[2], const T* from, int count, bool together) {
  if (together && count >= 2) {
    const auto both = *reinterpret_cast<const ElementPair<T>*>(from);
    values[0] = to_float(both.first), values[1] = to_float(both.second);
    return;
  }
  values[0] = count > 0 ? to_float(from[0]) : 0.0f;
  values[1] = count > 1 ? to_float(from[1]) : 0.0f;
}
template <class T>
DEVICE_FN void store_two(T* to, int count, bool together, float first, float second) {
  if (together && count >= 2) {
    *reinterpret_cast<ElementPair<T>*>(to) = {from_float<T>(first), from_float<T>(second)};
    return;
  }
  if (count > 0) to[0] = from_float<T>(first);
  if (count > 1) to[1] = from_float<T>(second);
}

// One slot's matrices, the columns of one chunk of F.
template <class E>
struct ChainMatrices {
  E b_gate[kTileColumns][kMaxRank + kPad], b_up[kTileColumns][kMaxRank + kPad];  // [column][r]
  E a_down[kMaxRank][kTileColumns + kPad];                                       // [r][column]
};
template <class W, class E>
DEVICE_FN void load_matrices(ChainMatrices<E>& m, const ChainPlan& p, int slot, int column) {
  const int rank = p.rank[slot], columns = std::min(int{kTileColumns}, p.width - column), padded = pad_16(rank);
  const PartSize b{columns, rank, kTileColumns, padded}, a{rank, columns, padded, kTileColumns};
  const int64_t start = static_cast<int64_t>(column) * rank;
  load_part(m.b_gate[0], kMaxRank + kPad, static_cast<const W*>(p.b_gate[slot]) + start, rank, b, p.ranks_aligned);
  load_part(m.b_up[0], kMaxRank + kPad, static_cast<const W*>(p.b_up[slot]) + start, rank, b, p.ranks_aligned);
  load_part(m.a_down[0], kTileColumns + kPad, static_cast<const W*>(p.a_down[slot]) + column, p.width, a,
            p.width_aligned);
}

// h of a strip in the warp's columns: h0's rows plus [B_gate u' | B_up u''].
template <class E>
struct StripHidden {
  float gate[kFragments][4], up[kFragments][4];

  DEVICE_FN StripHidden(const ChainPlan& p, const StripPairs& strip, const E* h0, int column) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int visit = strip.visit[strip_row(half)], c = column + strip_column(j);
        const int count = visit < 0 ? 0 : p.width - c;
        const E* row = h0 + static_cast<int64_t>(visit) * 2 * p.width + c;
        float two[2];
        load_two(two, row, count, p.pairs_together);
        gate[j][2 * half] = two[0], gate[j][2 * half + 1] = two[1];
        load_two(two, row + p.width, count, p.pairs_together);
        up[j][2 * half] = two[0], up[j][2 * half + 1] = two[1];
      }
    }
  }
  template <int kStride>
  DEVICE_FN void add_low_rank(const E (&u)[kStripRows][kStride], const ChainMatrices<E>& m, int rank, int own_column) {
    const int depth = pad_16(rank);
    strip_product<kFragments, true, true>(gate, StripOperand<E>{u[0], kStride},
                                          StripOperand<E>{m.b_gate[own_column], kMaxRank + kPad}, depth);
    strip_product<kFragments, true, true>(up, StripOperand<E>{u[0] + kMaxRank, kStride},
                                          StripOperand<E>{m.b_up[own_column], kMaxRank + kPad}, depth);
  }
};

// part[pair][column] (= if first, else +=) D, the 16 columns from `column` on, of which those below `columns` exist.
DEVICE_FN void add_to_part(float* part, int stride, const float (&sum)[2][4], int pair, int end, int column,
                           int columns, bool first) {
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int row = pair + strip_row(e % 4 / 2), c = strip_column(e / 4) + e % 2;
    if (row >= end || column + c >= columns) continue;
    float& to = part[static_cast<int64_t>(row) * stride + column + c];
    to = first ? sum[e / 4][e % 4] : to + sum[e / 4][e % 4];
  }
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
