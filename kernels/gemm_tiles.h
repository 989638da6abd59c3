#pragma once
// The device side of gemm_launch.h: a block finds the tile of C it owns, walks over the k it sums, and hands what it has summed to the
// epilogue.

#include "kernels/device/numeric.h"
#include "kernels/gemm_launch.h"

namespace lightmoe::LIGHTMOE_DEVICE {

// dots of the epilogue: each row's sum over the tiles of parts [tiles, m], for the rows of groups that are not skipped.
void add_dots(const GemmLaunch& p, const float* parts, int tiles);

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

// Stored row of B for line `line` of a tile that begins at `column`: the tile's columns of C. For SwiGLU a tile holds as many columns of
// the gate as of up, kRun by turns, so that both of an element are in one thread. -1: no such column.
template <int kRun>
DEVICE_FN int row_of_b(const GemmLaunch& p, int column, int line) {
  if (!p.epilogue.swiglu()) return column + line < p.n ? column + line : -1;
  const int f = column / 2 + line / (2 * kRun) * kRun + line % kRun, width = p.n / 2;
  return f < width ? f + line % (2 * kRun) / kRun * width : -1;
}

// What becomes of a tile's elements, kN neighbouring columns at a time (1 or 2), of which some may not exist. C is f32 or bf16.
template <class C>
class TileOutput {
 public:
  DEVICE_FN TileOutput(const GemmLaunch& launch, void* matrix)
      : p_(launch), c_(static_cast<C*>(matrix)), width_(p_.epilogue.swiglu() ? p_.n / 2 : p_.n) {
    together_ = p_.c_stride % 2 == 0 && aligned(c_);
    if (!plain()) together_ = together_ && width_ % 2 == 0 && aligned(p_.epilogue.activated) && aligned(p_.epilogue.h);
  }
  DEVICE_FN bool plain() const {
    return p_.epilogue.kind == GemmEpilogueKind::kNone || p_.epilogue.kind == GemmEpilogueKind::kScale;
  }
  DEVICE_FN int width() const { return width_; }  // columns are below it: of the product, or of an expert
  DEVICE_FN float scale(int row) const {
    const GemmLaunchEpilogue& e = p_.epilogue;
    if (e.scales == nullptr) return 1;
    return static_cast<const float*>(e.scales)[e.scale_rows != nullptr ? e.scale_rows[row] : row];
  }
  // C = beta C + alpha scale sum
  template <int kN>
  DEVICE_FN void update(int row, int column, float scale, const float (&sum)[kN]) const {
    C* c = c_ + row * p_.c_stride + column;
    const float factor = static_cast<float>(p_.alpha) * scale, beta = static_cast<float>(p_.beta);
    float values[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      values[i] = factor * sum[i];
      if (beta != 0 && column + i < width_) values[i] += beta * to_float(c[i]);
    }
    store(c, column, values);
  }
  template <int kN>
  DEVICE_FN void swiglu(int row, int f, float scale, const float (&gate)[kN], const float (&up)[kN]) const {
    if (c_ != nullptr) {
      C* c = c_ + row * p_.c_stride + f;
      store(c, f, gate), store(c + width_, f, up);
    }
    float a[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float g = rounded(gate[i]);
      a[i] = scale * (g * sigmoid(g) * rounded(up[i]));
    }
    store(static_cast<C*>(p_.epilogue.activated) + static_cast<int64_t>(row) * width_ + f, f, a);
  }
  // Returns these elements' part of the row's dot.
  template <int kN>
  DEVICE_FN float swiglu_backward(int row, int f, float scale, const float (&gradient)[kN]) const {
    const C* h = static_cast<const C*>(p_.epilogue.h) + static_cast<int64_t>(row) * 2 * width_ + f;
    float gate[kN] = {}, up[kN] = {}, a[kN] = {}, dot = 0;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (f + i >= width_) continue;
      const float g = to_float(h[i]), u = to_float(h[width_ + i]), s = sigmoid(g), silu = g * s;
      const float d = scale * gradient[i];
      gate[i] = d * u * (s + silu * (1.0f - s)), up[i] = d * silu, a[i] = scale * (silu * u);
      dot += gradient[i] * (silu * u);
    }
    C* c = c_ + row * p_.c_stride + f;
    store(c, f, gate), store(c + width_, f, up);
    if (p_.epilogue.activated != nullptr) {
      store(static_cast<C*>(p_.epilogue.activated) + static_cast<int64_t>(row) * width_ + f, f, a);
    }
    return dot;
  }
  // What a tile of so many columns sums up for a row.
  DEVICE_FN void store_dot(int row, int column, int tile_columns, float dot) const {
    static_cast<float*>(p_.epilogue.dots)[column / tile_columns * p_.epilogue.dots_stride + row] = dot;
  }

 private:
  DEVICE_FN static bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % (2 * sizeof(C)) == 0; }
  DEVICE_FN static float rounded(float value) { return to_float(from_float<C>(value)); }
  template <int kN>
  DEVICE_FN void store(C* to, int column, const float (&values)[kN]) const {
    if constexpr (kN == 2) {
      if (together_ && column + 1 < width_) {
        struct alignas(2 * sizeof(C)) Pair {
          C first, second;
        };
        *reinterpret_cast<Pair*>(to) = {from_float<C>(values[0]), from_float<C>(values[1])};
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (column + i < width_) to[i] = from_float<C>(values[i]);
    }
  }

  const GemmLaunch& p_;
  C* c_;
  int width_;
  bool together_;
};

// A backend's launch with memory for the dots of its tiles of so many columns, where the epilogue wants dots, and their sum afterwards.
template <class Run>
void with_dots(const GemmLaunch& p, int tile_columns, Run&& run) {
  if (p.epilogue.dots == nullptr) return run(p);
  const MemoryScope scope(MemoryCategory::kScratch);
  const int tiles = ceil_div(p.n, tile_columns);
  const Tensor parts = Tensor::empty({tiles, p.m}, DType::kF32, kDevice);
  GemmLaunch with_parts = p;
  with_parts.epilogue.dots = parts.raw(), with_parts.epilogue.dots_stride = p.m;
  run(with_parts);
  add_dots(p, parts.data<float>(), tiles);
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
