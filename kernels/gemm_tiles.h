#pragma once
// The device side of gemm_launch.h: a block finds the tile of C it owns, and walks over the k it sums.

#include "kernels/device/numeric.h"
#include "kernels/gemm_launch.h"

namespace lightmoe::LIGHTMOE_DEVICE {

struct GemmTile {
  int row, row_end, column;  // rows [row, row_end) of A and C (kGroupedM: of all groups' rows), columns from column on
  const void* b;
  void* c;
  int member, member_end;  // kGroupedK: entries of GemmLaunch::member to sum over
  int group;               // kGroupedM: whose rows these are
  DEVICE_FN bool empty() const { return row >= row_end; }
};

// Tile number `index` of tiles_of(launch, kRows, kColumns). Neighbours in index share their rows of A. Each warp asks for itself: it
// counts the groups' tiles 32 groups at a time, so a block needs neither a host's list nor a barrier. All lanes must call.
template <int kRows, int kColumns>
DEVICE_FN GemmTile find_tile(const GemmLaunch& p, int index) {
  const int across = ceil_div(p.n, kColumns), down = ceil_div(p.m, kRows);
  const int t = index / across;
  GemmTile tile{0, 0, (index - t * across) * kColumns, p.b.data, p.c, 0, 1, 0};
  if (p.kind == GemmKind::kDense) {
    tile.row = t * kRows;
    tile.row_end = std::min(tile.row + kRows, p.m);
    return tile;
  }
  if (p.kind == GemmKind::kGroupedK) {
    const int output = t / down;
    tile.row = (t - output * down) * kRows;
    tile.row_end = std::min(tile.row + kRows, p.m);
    tile.c = p.group_data[output];
    tile.member = p.first[output], tile.member_end = p.first[output + 1];
    return tile;
  }
  int before = 0;  // tiles of earlier groups
  for (int group = lane_id(); group - lane_id() < p.num_groups; group += 32) {
    int begin = 0, end = 0;
    if (group < p.num_groups && p.group_data[group] != nullptr) begin = p.offsets[group], end = p.offsets[group + 1];
    const int tiles = ceil_div(end - begin, kRows);
    int through = tiles;  // of these 32 groups up to mine
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = shuffle_up(through, distance);
      if (lane_id() >= distance) through += other;
    }
    through += before;
    const int owner = reduce_add(t >= through ? 1 : 0);  // lanes whose groups end before t
    if (owner < 32) {
      const int first_row = begin + (t - (through - tiles)) * kRows;
      tile.row = shuffle(first_row, owner);
      tile.row_end = std::min(tile.row + kRows, shuffle(end, owner));
      tile.group = group - lane_id() + owner;
      tile.b = p.group_data[tile.group];
      return tile;
    }
    before = shuffle(through, 31);
  }
  return tile;
}

// The k of a tile in steps of kStep: [0, k), or the rows of its groups one group after the other. A step never crosses a group's end.
template <int kStep>
struct DepthCursor {
  const GemmLaunch& p;
  int member, member_end;
  int k = 0, end = 0;  // this step covers [k, min(k + kStep, end))

  DEVICE_FN DepthCursor(const GemmLaunch& launch, const GemmTile& tile)
      : p(launch), member(tile.member), member_end(tile.member_end) {
    enter();
  }
  DEVICE_FN bool done() const { return member >= member_end; }
  DEVICE_FN void next() {
    k += kStep;
    if (k >= end) {
      ++member;
      enter();
    }
  }
  DEVICE_FN void enter() {  // the first member from here on that has any k
    for (; member < member_end; ++member) {
      k = p.kind == GemmKind::kGroupedK ? p.offsets[p.member[member]] : 0;
      end = p.kind == GemmKind::kGroupedK ? p.offsets[p.member[member] + 1] : p.k;
      if (k < end) return;
    }
  }
};

DEVICE_FN int64_t row_start(const GemmOperand& x, int row) {
  return (x.rows != nullptr ? x.rows[row] : row) * x.stride;
}

// May C's elements be written two at a time, from even columns on?
template <class C>
DEVICE_FN bool pairs_aligned(const GemmLaunch& p, const C* matrix) {
  return p.c_stride % 2 == 0 && reinterpret_cast<uintptr_t>(matrix) % (2 * sizeof(C)) == 0;
}
// C's two columns from c on, of which `count` are inside; `together`: in one access.
template <class C>
DEVICE_FN void update_pair(C* c, int count, bool together, const GemmLaunch& p, float first, float second) {
  const float alpha = static_cast<float>(p.alpha), beta = static_cast<float>(p.beta);
  first *= alpha, second *= alpha;
  if (beta != 0) {
    first += beta * to_float(c[0]);
    if (count > 1) second += beta * to_float(c[1]);
  }
  if (together && count > 1) {
    struct alignas(2 * sizeof(C)) Pair {
      C first, second;
    };
    *reinterpret_cast<Pair*>(c) = {from_float<C>(first), from_float<C>(second)};
    return;
  }
  c[0] = from_float<C>(first);
  if (count > 1) c[1] = from_float<C>(second);
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
