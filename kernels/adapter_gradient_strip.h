#pragma once
// Backward of one strip of pairs (kernels/adapter_chain.h): h again, c = ds + A_down^T e, and what follows element by element.

#include "kernels/adapter_tiles.h"

namespace lightmoe::LIGHTMOE_DEVICE {

struct StripElement {
  float a, dgate, dup;
};

template <class E>
struct StripGradient {
  StripHidden<E> h;
  float c[kFragments][4];

  DEVICE_FN StripGradient(const ChainPlan& p, const StripPairs& strip, const E* h0, const E* ds, int column)
      : h(p, strip, h0, column) {
#pragma unroll
    for (int e = 0; e < 2 * kFragments; ++e) {
      const int j = e / 2, half = e % 2, visit = strip.visit[strip_row(half)], at = column + strip_column(j);
      float two[2];
      load_two(two, ds + static_cast<int64_t>(visit) * p.width + at, visit < 0 ? 0 : p.width - at, p.pairs_together);
      c[j][2 * half] = two[0], c[j][2 * half + 1] = two[1];
    }
  }
  template <int kStride, int kOtherStride>
  DEVICE_FN void add_low_rank(const E (&u)[kStripRows][kStride], const E (&e)[kStripRows][kOtherStride],
                              const ChainMatrices<E>& m, int rank, int own_column) {
    h.add_low_rank(u, m, rank, own_column);
    strip_product<kFragments, true, false>(c, StripOperand<E>{e[0], kOtherStride},
                                           StripOperand<E>{m.a_down[0] + own_column, kTileColumns + kPad},
                                           pad_16(rank));
  }
  // a and the gradients of gate and up, of da = gate c.
  DEVICE_FN StripElement element(int j, int i, float gate) const {
    const float g = h.gate[j][i], up = h.up[j][i], s = sigmoid(g), silu = g * s, da = gate * c[j][i];
    return {silu * up, da * up * (s + silu * (1.0f - s)), da * silu};
  }
};

}  // namespace lightmoe::LIGHTMOE_DEVICE
