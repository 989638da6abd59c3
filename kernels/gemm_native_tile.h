#pragma once
// The inner kernels of the native GEMM, in registers: packed panels in, f32 sums out.
// Every sum is one chain over k in ascending order, whatever the tile, so that all paths give the same bits.

#include <cstdint>

#include "kernels/gemm.h"
#include "kernels/gemm_native_simd.h"

namespace lightmoe::native {

// 14 x 2 sums, 2 vectors of B and one of A are 31 of AVX-512's 32 registers; 6 x 2 fit 16 shorter ones.
inline constexpr int kMaxRows = kLanes == 16 ? 14 : 6;
inline constexpr int kMaxVectors = 2;
inline constexpr int kColumns = kMaxVectors * kLanes;

// C = beta C + alpha sums.
struct TileOutput {
  void* c;
  DType dtype;
  int64_t stride;
  float alpha, beta;
};

// One block of k of one tile: a [steps][rows] times b [steps][vectors * kLanes], after what is in sums (first: zero).
// c null: the sums go back to sums[rows][vectors * kLanes]; else, f32 and all columns of the tile, C is written from registers.
struct TileCall {
  int64_t steps;
  const uint32_t *a, *b;
  float* sums;
  bool first;
  float* c;
  int64_t stride;
  float alpha, beta;
};
using TileFunction = void (*)(const TileCall&);
TileFunction tile_function(GemmCompute compute, int rows, int vectors);

// C from sums in memory, rows x columns elements, sums_stride floats from one row of sums to the next: any dtype, any width.
void write_tile(const TileOutput& out, int64_t row, int64_t column, int rows, int columns, const float* sums,
                int64_t sums_stride);

}  // namespace lightmoe::native
