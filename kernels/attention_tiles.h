#pragma once
// What attention.cpp and attention_backward.cpp share: sequences as spans, blocks of keys and queries copied into tiles.
// A tile holds kKeyBlock keys counted from key 0 of the sequence, in the compute type, rows padded to whole vectors: where a row lies
// in memory, and what lies beside it, cannot reach the result.

#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/attention.h"
#include "kernels/cpu_math.h"
#include "kernels/simd.h"
#include "kernels/tile_product.h"
#include "runtime/parallel.h"

namespace lightmoe::attention_detail {

inline constexpr int64_t kKeyBlock = 64;  // a tile of keys and one of values, 128 wide in f32, stay in a core's L2
inline constexpr int64_t kTileRows = 64;  // (query, head) pairs of a tile
inline constexpr int64_t kThreadCost = int64_t{1} << 20;  // multiply-adds below which another thread does not pay

struct Sizes {
  int64_t queries, sequences, heads, kv_heads, head_dim, group;
  template <class Op>
  explicit Sizes(const Op& op)
      : queries(op.q.dim(0)),
        sequences(op.sequences.k_begin.dim(0)),
        heads(op.q.dim(1) / op.head_dim),
        kv_heads(op.k.dim(1) / op.head_dim),
        head_dim(op.head_dim),
        group(heads / kv_heads) {}
  int64_t query_block() const { return std::max<int64_t>(1, kTileRows / group); }
  int64_t tile_rows() const { return query_block() * group; }
};

struct Span {
  int64_t q_begin, queries, k_begin, k_count, q_pos;
  int64_t visible(int64_t j) const { return std::max<int64_t>(0, std::min(k_count, q_pos + j + 1)); }
};
inline Span span_of(const AttentionSequences& s, int64_t n) {
  const int32_t* q_begin = s.q_begin.data<int32_t>() + n;
  return {q_begin[0], q_begin[1] - q_begin[0], s.k_begin.data<int32_t>()[n], s.k_count.data<int32_t>()[n],
          s.q_pos.data<int32_t>()[n]};
}

// f(T, K): the type of q and the type of k and v, which is the same or bf16 under f32.
template <class F>
void visit_types(const char* op, DType q, DType kv, F&& f) {
  visit_floating(op, q, [&]<class T>() {
    if (kv == q) return f.template operator()<T, T>();
    if constexpr (std::is_same_v<T, float>) {
      if (kv == DType::kBF16) return f.template operator()<T, bf16>();
    }
    unsupported_dtype(op, kv);
  });
}

// Workers take items one at a time, in order, each with a workspace of its own: work(next) loops while next() gives an item.
template <class F>
void share_items(int64_t items, int64_t total_cost, const F& work) {
  std::atomic<int64_t> taken{0};
  const auto next = [&]() -> int64_t {
    const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
    return item < items ? item : -1;
  };
  const int64_t workers = std::clamp<int64_t>(std::min(items, total_cost / kThreadCost), 1, num_threads());
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) work(next);
  });
}

// --- copies into tiles -----------------------------------------------------------------------------

// Exchanges the off-diagonal blocks of size Step in every 2 Step x 2 Step block: all steps together transpose.
template <int Step, class C, int... Lane>
[[gnu::always_inline]] inline void exchange(Vec<C>& low, Vec<C>& high, std::integer_sequence<int, Lane...>) {
  constexpr int kCount = static_cast<int>(kLanes<C>);
  const Vec<C> a = low, b = high;
  low = __builtin_shufflevector(a, b, ((Lane & Step) ? kCount + Lane - Step : Lane)...);
  high = __builtin_shufflevector(a, b, ((Lane & Step) ? kCount + Lane : Lane + Step)...);
}

template <int Step, class C>
[[gnu::always_inline]] inline void transpose_step(std::array<Vec<C>, kLanes<C>>& rows) {
  for (size_t r = 0; r < rows.size(); ++r) {
    if ((r & Step) == 0) exchange<Step, C>(rows[r], rows[r + Step], std::make_integer_sequence<int, kLanes<C>>());
  }
  if constexpr (Step > 1) transpose_step<Step / 2, C>(rows);
}

// to[d][r] = from[r][d], d < width; zeros for the columns from `rows` up to a whole vector.
template <class T, class C>
void transpose_tile(const T* from, int64_t from_row, int64_t rows, int64_t width, C* to, int64_t to_row) {
  constexpr int64_t kBlock = kLanes<C>;
  for (int64_t first = 0; first < rows; first += kBlock) {
    for (int64_t d = 0; d < width; d += kBlock) {
      std::array<Vec<C>, kBlock> block;
      for (int64_t r = 0; r < kBlock; ++r) {
        Vec<C>& row = block[static_cast<size_t>(r)];
        const T* source = from + (first + r) * from_row + d;
        if (first + r >= rows)
          row = Vec<C>{};
        else if (d + kBlock <= width)
          row = load_vec(source);
        else
          row = load_part(source, width - d);
      }
      transpose_step<static_cast<int>(kBlock / 2), C>(block);
      for (int64_t r = 0; r < std::min(kBlock, width - d); ++r) {
        store_vec<C>(to + (d + r) * to_row + first, block[static_cast<size_t>(r)]);
      }
    }
  }
}

}  // namespace lightmoe::attention_detail
