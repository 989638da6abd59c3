#include "kernels/gemm_native_pack.h"

#include <algorithm>

namespace lightmoe::native {
namespace {

// bf16 rows are moved as pairs also where the product is in f32, and split after the transposition.
template <class T, class Mode>
constexpr bool kPairs = Mode::kPerStep == 2 || std::is_same_v<T, bf16>;
template <class T, class Mode>
constexpr int kBlock = kPairs<T, Mode> ? 2 * kLanes : kLanes;  // values of k

// n values of k (at most kBlock) of kLanes rows, to consecutive steps of a panel; returns the step after them.
template <class T, class Mode>
[[gnu::always_inline]] inline uint32_t* pack_block(const T* const (&rows)[kLanes], int64_t k, int n, uint32_t* out,
                                                   int width) {
  Dwords block[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if constexpr (kPairs<T, Mode>)
      block[i] = load_pairs(rows[i] + k, n);
    else
      block[i] = as_dwords(load_floats(rows[i] + k, n));
  }
  transpose(block);
#pragma GCC unroll 32
  for (int s = 0; s < n; s += kPairs<T, Mode> ? 2 : 1) {
    const Dwords step = block[kPairs<T, Mode> ? s / 2 : s];
    if constexpr (kPairs<T, Mode> && Mode::kPerStep == 1) {
      store_vector(out, as_dwords(even_of(step))), out += width;
      if (s + 1 < n) store_vector(out, as_dwords(odd_of(step))), out += width;
    } else {
      store_vector(out, step), out += width;
    }
  }
  return out;
}

// Lanes are stored rows: they are transposed block by block.
template <class T, class Mode>
void pack_rows(const GemmMatrix& x, int64_t lane, int count, int width, int64_t k_begin, int64_t k_end,
               uint32_t* panel) {
  constexpr int kFull = kBlock<T, Mode>;
  for (int w = 0; w < width; w += kLanes) {
    const T* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = static_cast<const T*>(x.data) + x.row_offset(lane + std::min(w + i, count - 1));
    }
    uint32_t* out = panel + w;
    int64_t k = k_begin;
    for (; k + kFull <= k_end; k += kFull) out = pack_block<T, Mode>(rows, k, kFull, out, width);
    if (k < k_end) pack_block<T, Mode>(rows, k, static_cast<int>(k_end - k), out, width);
  }
}

// Lanes are stored columns: they are copied row by row.
template <class T, class Mode>
void pack_columns(const GemmMatrix& x, int64_t lane, int count, int width, int64_t k_begin, int64_t k_end,
                  uint32_t* panel) {
  const T* data = static_cast<const T*>(x.data) + lane;
  for (int64_t k = k_begin; k < k_end; k += Mode::kPerStep, panel += width) {
    const T* even = data + x.row_offset(k);
    const T* odd = k + 1 < k_end ? data + x.row_offset(k + 1) : nullptr;
    for (int w = 0; w < width; w += kLanes) {
      const int n = std::clamp(count - w, 0, kLanes);
      if constexpr (Mode::kPerStep == 1) {
        store_vector(panel + w, n > 0 ? load_floats(even + w, n) : Floats{});
      } else {
        const Dwords low = n > 0 ? widened(load_words(even + w, n)) : Dwords{};
        const Dwords high = n > 0 && odd != nullptr ? widened(load_words(odd + w, n)) : Dwords{};
        store_vector(panel + w, low | high << 16);
      }
    }
  }
}

template <class T, class Mode>
void pack(const PanelSource& source, int64_t lane, int count, int width, int64_t k_begin, int64_t k_end,
          uint32_t* panel) {
  const auto function = source.lanes_are_rows ? &pack_rows<T, Mode> : &pack_columns<T, Mode>;
  function(source.matrix, lane, count, width, k_begin, k_end, panel);
}

}  // namespace

void pack_panel(const PanelSource& source, int64_t lane, int count, int width, int64_t k_begin, int64_t k_end,
                uint32_t* panel) {
  const bool narrow = source.matrix.dtype == DType::kBF16;
  const auto in_f32 = narrow ? &pack<bf16, InF32> : &pack<float, InF32>;
  const auto in_bf16 = narrow ? &pack<bf16, InBF16> : &pack<float, InBF16>;
  (source.compute == GemmCompute::kBF16 ? in_bf16 : in_f32)(source, lane, count, width, k_begin, k_end, panel);
}

}  // namespace lightmoe::native
