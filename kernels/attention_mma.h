#pragma once
// Tiles of bf16 rows for m16n8k16 products. A tile's rows are 16 bytes longer than needed: the eight rows of an 8 x 8 matrix then lie in
// different banks. In a fragment of 8 columns a lane holds columns 2 (lane % 4) and the next of rows lane / 4 and lane / 4 + 8.

#include "kernels/attention_device.h"
#include "kernels/device/ptx.h"

namespace lightmoe::LIGHTMOE_DEVICE {

// Starts copying row(0), row(1), ... to `to`; zeros from row `count` on.
template <int kRows, int kStride, class F>
DEVICE_FN void copy_rows(const bf16* from, int count, bf16 (*to)[kStride], F&& row) {
  constexpr int kUnits = (kStride - 8) / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kUnits; i += static_cast<int>(blockDim.x)) {
    const int r = i / kUnits, column = i % kUnits * 8;
    ptx::cp_async_16(&to[r][column], r < count ? from + row(r) + column : from, r < count ? 16 : 0);
  }
}

// A[16, 16] at (row, column) of the tile.
template <int kStride>
DEVICE_FN void load_a(uint32_t (&a)[4], const bf16 (*tile)[kStride], int row, int column) {
  ptx::ldmatrix_x4(a, &tile[row + lane_id() % 16][column + lane_id() / 16 * 8]);
}

// d[j] += a (tile rows n + 8 j, columns k to k + 16)^T for j = 0, 1.
template <int kStride>
DEVICE_FN void multiply_transposed(float (*d)[4], const uint32_t (&a)[4], const bf16 (*tile)[kStride], int n, int k) {
  uint32_t b[4];
  ptx::ldmatrix_x4(b, &tile[n + lane_id() / 16 * 8 + lane_id() % 8][k + lane_id() / 8 % 2 * 8]);
  ptx::mma_m16n8k16_bf16(d[0], a, {b[0], b[1]});
  ptx::mma_m16n8k16_bf16(d[1], a, {b[2], b[3]});
}

// d[c] += a (tile rows k to k + 16, columns 8 c to 8 c + 8) for all columns; a is made of two neighbouring fragments of factors.
template <int kColumns, int kStride>
DEVICE_FN void add_products(float (&d)[kColumns][4], const float (*factors)[4], const bf16 (*tile)[kStride], int k) {
  const uint32_t a[4] = {pack_bf16(factors[0][0], factors[0][1]), pack_bf16(factors[0][2], factors[0][3]),
                         pack_bf16(factors[1][0], factors[1][1]), pack_bf16(factors[1][2], factors[1][3])};
#pragma unroll
  for (int c = 0; c < kColumns; c += 2) {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, &tile[k + lane_id() % 16][8 * c + lane_id() / 16 * 8]);
    ptx::mma_m16n8k16_bf16(d[c], a, {b[0], b[1]});
    ptx::mma_m16n8k16_bf16(d[c + 1], a, {b[2], b[3]});
  }
}

// head_dim 64 or 128, all of bf16, starts of 16 bytes.
template <class... Tensors>
bool takes_mma(int64_t head_dim, const Tensors&... tensors) {
  const auto fits = [](const Tensor& t) {
    return t.dtype() == DType::kBF16 && reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0;
  };
  return (head_dim == 64 || head_dim == 128) && (fits(tensors) && ...);
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
