#pragma once
// The second half of sums over rows for each column (gradients of norms' weights): blocks have summed their chunk of rows into
// partial[chunk, column], rows of `stride`; here the chunks are added in a fixed order.

#include "kernels/device/simt.h"

namespace lightmoe::LIGHTMOE_DEVICE {

inline constexpr int kAddWarps = 32;

struct AddChunksShared {
  float warp[kAddWarps][32];
};

// sums[column] += the sum over the chunks; lanes own columns, a warp every 32nd chunk.
template <class Sum>
__global__ void __launch_bounds__(32 * kAddWarps)
    add_chunks_kernel(const float* partial, Sum* sums, int chunks, int columns, int stride) {
  auto& shared = shared_memory<AddChunksShared>();
  const int column = static_cast<int>(blockIdx.x) * 32 + lane_id();
  float sum = 0;
  for (int c = warp_id(); c < chunks; c += kAddWarps) {
    if (column < columns) sum += partial[static_cast<int64_t>(c) * stride + column];
  }
  shared.warp[warp_id()][lane_id()] = sum;
  sync_block();
  if (warp_id() != 0 || column >= columns) return;
  for (int w = 1; w < kAddWarps; ++w) sum += shared.warp[w][lane_id()];
  sums[column] += sum;
}

inline void add_chunks(const float* partial, float* sums, int chunks, int columns, int stride) {
  launch<add_chunks_kernel<float>>({.blocks = {static_cast<uint32_t>(ceil_div(columns, 32))},
                                    .threads = {32 * kAddWarps},
                                    .shared_bytes = sizeof(AddChunksShared)},
                                   partial, sums, chunks, columns, stride);
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
