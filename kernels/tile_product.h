#pragma once
// Small products of matrices that are in cache, for kernels that fuse a product with something else (attention, router gradients):
//   C[m,n] (=|+=) sum_k A(m,k) B[k,n]
// A is read element by element at a.data[m * a.row + k * a.column], so a transposed A costs nothing; B and C are row-major, n a
// multiple of kLanes<C>. Each element of C is one chain of fused multiply-adds in order of k: its bits do not depend on m, n or
// on the tile it falls into. Serial; the caller parallelises.

#include "kernels/simd.h"

namespace lightmoe {

template <class C>
struct TileFactor {
  const C* data;
  int64_t row, column;
};
template <class C>
struct TileResult {
  C* data;
  int64_t row;
  bool add;
};

namespace tile_detail {

// R rows by V vectors of C in registers.
template <int R, int V, class C>
[[gnu::always_inline]] inline void micro(int64_t depth, TileFactor<C> a, const C* b, int64_t b_row, TileResult<C> c) {
  Vec<C> sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = c.add ? load_vec(c.data + r * c.row + v * kLanes<C>) : Vec<C>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<C> factor[V];
    for (int v = 0; v < V; ++v) factor[v] = load_vec(b + k * b_row + v * kLanes<C>);
    for (int r = 0; r < R; ++r) {
      const C value = a.data[r * a.row + k * a.column];
      for (int v = 0; v < V; ++v) sum[r][v] += value * factor[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store_vec<C>(c.data + r * c.row + v * kLanes<C>, sum[r][v]);
  }
}

template <int V, class C>
void columns(int64_t m, int64_t depth, TileFactor<C> a, const C* b, int64_t b_row, TileResult<C> c) {
  constexpr int kRows = 6;  // 6 x 4 accumulators, 4 vectors of B and one of A fit the 32 registers
  const auto step = [&]<int R>() {
    micro<R, V>(depth, a, b, b_row, c);
    a.data += R * a.row, c.data += R * c.row, m -= R;
  };
  while (m >= kRows) step.template operator()<kRows>();
  if (m >= 4) step.template operator()<4>();
  if (m >= 2) step.template operator()<2>();
  if (m >= 1) step.template operator()<1>();
}

}  // namespace tile_detail

template <class C>
void tile_product(int64_t m, int64_t n, int64_t depth, TileFactor<C> a, const C* b, int64_t b_row, TileResult<C> c) {
  const auto step = [&]<int V>() {
    tile_detail::columns<V>(m, depth, a, b, b_row, c);
    b += V * kLanes<C>, c.data += V * kLanes<C>, n -= V * kLanes<C>;
  };
  while (n >= 4 * kLanes<C>) step.template operator()<4>();
  if (n >= 2 * kLanes<C>) step.template operator()<2>();
  if (n >= kLanes<C>) step.template operator()<1>();
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// rows x width elements at distance from_row, times scale, to rows of to_row >= width elements; zeros behind each row.
template <class T, class C>
void copy_tile(const T* from, int64_t from_row, int64_t rows, int64_t width, C scale, C* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t i = 0;
    for (; i + kLanes<C> <= width; i += kLanes<C>) store_vec<C>(to + i, scale * load_vec(from + i));
    for (; i < width; ++i) to[i] = scale * load(from, i);
    for (; i < to_row; ++i) to[i] = 0;
    from += from_row, to += to_row;
  }
}

}  // namespace lightmoe
