#pragma once
// Products of one warp on operands in shared memory, 16 rows at a time:  D (16 x 8 N) += A (16 x depth) B (depth x 8 N).
// Operands of bf16 go to the tensor cores (mma.sync m16n8k16); operands of f32 are multiplied by ordinary instructions on the same
// fragments, in ascending k either way. A lane holds of fragment j the columns 8 j + 2 (lane % 4) and the next, of rows lane / 4
// (elements 0, 1) and lane / 4 + 8 (elements 2, 3). Rows of an operand start at multiples of 16 bytes; depth is a multiple of 16. Where
// B has fewer than 8 N columns, fragments behind `columns` (a multiple of 16) are left as they are.

#include "kernels/device/numeric.h"

namespace lightmoe::LIGHTMOE_DEVICE {

// An operand with K along its stored rows (A: [row][k], B: [column][k]) or across them ([k][row], [k][column]).
template <class E>
struct StripOperand {
  const E* at;
  int stride;
};

inline constexpr int kStripRows = 16;
DEVICE_FN int strip_row(int half) { return lane_id() / 4 + 8 * half; }   // of elements 2 half, 2 half + 1
DEVICE_FN int strip_column(int j) { return j * 8 + lane_id() % 4 * 2; }  // the first of fragment j's two

namespace detail {
template <bool kAlongK, class E>
DEVICE_FN float strip_element(const StripOperand<E>& x, int i, int k) {
  return to_float(kAlongK ? x.at[i * x.stride + k] : x.at[k * x.stride + i]);
}
}  // namespace detail

template <int kFragments, bool kAAlongK, bool kBAlongK>
DEVICE_FN void strip_product(float (&sum)[kFragments][4], StripOperand<float> a, StripOperand<float> b, int depth,
                             int columns = 8 * kFragments) {
#pragma unroll 1
  for (int k = 0; k < depth; ++k) {
    const float top = detail::strip_element<kAAlongK>(a, strip_row(0), k),
                bottom = detail::strip_element<kAAlongK>(a, strip_row(1), k);
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
      if (j * 8 >= columns) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float factor = detail::strip_element<kBAlongK>(b, strip_column(j) + i, k);
        sum[j][i] += top * factor;
        sum[j][2 + i] += bottom * factor;
      }
    }
  }
}

template <int kFragments, bool kAAlongK, bool kBAlongK>
DEVICE_FN void strip_product(float (&sum)[kFragments][4], StripOperand<bf16> a, StripOperand<bf16> b, int depth,
                             int columns = 8 * kFragments) {
  static_assert(kFragments % 2 == 0);
  const int lane = lane_id(), low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    uint32_t fragment[4];
    if constexpr (kAAlongK) {
      ptx::ldmatrix_x4(fragment, a.at + (low + middle) * a.stride + k + high);
    } else {
      ptx::ldmatrix_x4_trans(fragment, a.at + (k + high + low) * a.stride + middle);
    }
#pragma unroll
    for (int j = 0; j < kFragments; j += 2) {
      if (j * 8 >= columns) break;
      uint32_t factors[4];
      if constexpr (kBAlongK) {
        ptx::ldmatrix_x4(factors, b.at + (j * 8 + high + low) * b.stride + k + middle);
      } else {
        ptx::ldmatrix_x4_trans(factors, b.at + (k + middle + low) * b.stride + j * 8 + high);
      }
      ptx::mma_m16n8k16_bf16(sum[j], fragment, {factors[0], factors[1]});
      ptx::mma_m16n8k16_bf16(sum[j + 1], fragment, {factors[2], factors[3]});
    }
  }
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
