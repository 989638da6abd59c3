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

struct PackArguments {
  const GemmMatrix& matrix;
  const Panels& panels;
  int64_t panel_begin, panel_end, k_begin, k_end, steps;
  uint32_t* to;
  uint32_t* panel(int64_t i) const { return to + (panels.begin(i) - panels.begin(panel_begin)) * steps; }
};

// A panel of one row, the step after the step before.
template <class T, class Mode>
void pack_row(const T* row, int64_t k_begin, int64_t k_end, uint32_t* out) {
  constexpr int64_t kAtOnce = kLanes * Mode::kPerStep;
  for (int64_t k = k_begin; k < k_end; k += kAtOnce, out += kLanes) {
    const int n = static_cast<int>(std::min(kAtOnce, k_end - k));
    if constexpr (Mode::kPerStep == 2)
      store_vector(out, load_pairs(row + k, n));
    else
      store_vector(out, as_dwords(load_floats(row + k, n)));
  }
}

// Lanes are stored rows: they are transposed block by block.
template <class T, class Mode>
void pack_rows(const PackArguments& p) {
  constexpr int kFull = kBlock<T, Mode>;
  for (int64_t i = p.panel_begin; i < p.panel_end; ++i) {
    const int width = p.panels.width(i), last = p.panels.lanes_in(i) - 1;
    const int64_t first = p.panels.first + p.panels.begin(i);
    if (width == 1) {
      pack_row<T, Mode>(static_cast<const T*>(p.matrix.data) + p.matrix.row_offset(first), p.k_begin, p.k_end,
                        p.panel(i));
      continue;
    }
    for (int w = 0; w < width; w += kLanes) {
      const T* rows[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        rows[l] = static_cast<const T*>(p.matrix.data) + p.matrix.row_offset(first + std::min(w + l, last));
      }
      uint32_t* out = p.panel(i) + w;
      int64_t k = p.k_begin;
      for (; k + kFull <= p.k_end; k += kFull) out = pack_block<T, Mode>(rows, k, kFull, out, width);
      if (k < p.k_end) pack_block<T, Mode>(rows, k, static_cast<int>(p.k_end - k), out, width);
    }
  }
}

// The first `lanes` elements of one stored row (of two, in pairs; odd is null behind the last) to one step of a panel.
// Full vectors are written where they stay within `room` dwords, the rest of the panel, whose later steps are written later.
template <class T, class Mode>
[[gnu::always_inline]] inline void pack_step(const T* even, const T* odd, int lanes, int64_t room, uint32_t* out) {
  for (int w = 0; w < lanes; w += kLanes) {
    const int n = std::min(lanes - w, kLanes);
    Dwords step;
    if constexpr (Mode::kPerStep == 1) {
      step = as_dwords(load_floats(even + w, n));
    } else {
      const Dwords high = odd != nullptr ? widened(load_words(odd + w, n)) : Dwords{};
      step = widened(load_words(even + w, n)) | high << 16;
    }
    if (w + kLanes <= room)
      store_vector(out + w, step);
    else
      store_first(reinterpret_cast<float*>(out + w), as_floats(step), n);
  }
}

// Lanes are stored columns: a few stored rows at a time, so that each panel is written in long pieces. A row is left after
// a few hundred bytes, which no hardware prefetcher follows: the rows to come are asked for here.
template <class T, class Mode>
void pack_columns(const PackArguments& p) {
  constexpr int64_t kStepsAtOnce = 8, kAhead = 2 * kStepsAtOnce * Mode::kPerStep, kLine = 64 / sizeof(T);
  const T* data = static_cast<const T*>(p.matrix.data) + p.panels.first;
  const int64_t steps = (p.k_end - p.k_begin + Mode::kPerStep - 1) / Mode::kPerStep;
  for (int64_t s0 = 0; s0 < steps; s0 += kStepsAtOnce) {
    const int64_t s1 = std::min(s0 + kStepsAtOnce, steps);
    for (int64_t i = p.panel_begin; i < p.panel_end; ++i) {
      const int width = p.panels.width(i), lanes = p.panels.lanes_in(i);
      const T* column = data + p.panels.begin(i);
      uint32_t* out = p.panel(i) + s0 * width;
      for (int64_t s = s0; s < s1; ++s, out += width) {
        const int64_t k = p.k_begin + s * Mode::kPerStep;
        const T* even = column + p.matrix.row_offset(k);
        const T* odd = Mode::kPerStep == 2 && k + 1 < p.k_end ? column + p.matrix.row_offset(k + 1) : nullptr;
        for (int64_t r = k + kAhead; r < std::min(k + kAhead + Mode::kPerStep, p.k_end); ++r) {
          const T* later = column + p.matrix.row_offset(r);
          for (int64_t l = 0; l < lanes; l += kLine) __builtin_prefetch(later + l, 0, 2);
        }
        if (lanes == 2 * kLanes)
          pack_step<T, Mode>(even, odd, 2 * kLanes, 2 * kLanes, out);
        else
          pack_step<T, Mode>(even, odd, lanes, (steps - s) * width, out);
      }
    }
  }
}

template <class T>
void pack_as(GemmCompute compute, bool lanes_are_rows, const PackArguments& p) {
  if (compute == GemmCompute::kBF16) return lanes_are_rows ? pack_rows<T, InBF16>(p) : pack_columns<T, InBF16>(p);
  lanes_are_rows ? pack_rows<T, InF32>(p) : pack_columns<T, InF32>(p);
}

}  // namespace

void pack(const PanelSource& source, const Panels& panels, int64_t panel_begin, int64_t panel_end, int64_t k_begin,
          int64_t k_end, int64_t steps, uint32_t* to) {
  const PackArguments arguments{source.matrix, panels, panel_begin, panel_end, k_begin, k_end, steps, to};
  if (source.matrix.dtype == DType::kBF16) return pack_as<bf16>(source.compute, source.lanes_are_rows, arguments);
  pack_as<float>(source.compute, source.lanes_are_rows, arguments);
}

}  // namespace lightmoe::native
