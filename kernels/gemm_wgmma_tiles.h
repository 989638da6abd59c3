#pragma once
// What the two kernels of the wgmma backend share (gemm_wgmma.cu, gemm_wgmma_k.cu): a ring of stages in shared memory that one warpgroup
// fills and two empty, 64 rows of the tile each, and what becomes of their accumulators.

#include "kernels/device/stage_ring.h"
#include "kernels/gemm_tiles.h"

namespace lightmoe::LIGHTMOE_DEVICE {

// GroupedGemmK's launches (gemm_wgmma_k.cu).
void multiply_k_wgmma(const std::vector<GemmLaunch>& launches);

namespace wgmma {

constexpr int kRows = 128, kDepth = 64;  // kDepth bf16 are one swizzled row of 128 bytes
constexpr int kStages = 4;
constexpr int kConsumers = 2, kWarpgroup = 128, kThreads = kWarpgroup * (1 + kConsumers);

template <int kColumns>
struct Shared {
  alignas(1024) bf16 a[kStages][kRows * kDepth];
  alignas(1024) bf16 b[kStages][kColumns * kDepth];  // [column][k], or boxes of 64 columns [k][column]
  uint64_t full[kStages], free[kStages];
};

#ifdef LIGHTMOE_HOPPER_CODE

// Steps of gathered copies in flight. At most kStages - 2: a stage comes free when the multiplication after its own has begun.
constexpr int kLag = 2;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
constexpr int kBoxElements = kDepth * kDepth;

using Ring = StageRing<kStages>;

// All threads, before the warpgroups part: full_arrivals fill a stage, one of each consumer warp frees it (wgmma_wait speaks for its own
// warp).
template <int kColumns>
DEVICE_FN void prepare_ring(Shared<kColumns>& shared, int full_arrivals) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&shared.full[s], static_cast<uint32_t>(full_arrivals));
      ptx::mbarrier_init(&shared.free[s], kConsumers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  sync_block();
}
DEVICE_FN void release(uint64_t* free) {
  if (lane_id() == 0) ptx::mbarrier_arrive(free);
}

// The epilogue of 64 rows. Of SwiGLU's tiles the first half of the columns is gate, the second up.
template <class C, int kColumns>
DEVICE_FN void store_tile(const GemmLaunch& p, const GemmTile& tile, int first_row, const float (&sum)[kColumns / 2]) {
  const TileOutput<C> out(p, tile.c);
  const bool swiglu = p.epilogue.swiglu();
  constexpr int kHalf = kColumns / 4;  // accumulators of a thread in half a tile
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + warp_id() % 4 * 16 + half * 8 + lane_id() / 4;
    const bool present = row < tile.row_end;
    const float scale = present ? out.scale(row) : 0.0f;
    float dot = 0;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const int i = 4 * j + 2 * half, pair = lane_id() % 4 * 2;
      const int column = (swiglu ? tile.column / 2 : tile.column) + j * 8 + pair;
      if (!present || column >= out.width() || (swiglu && i >= kHalf)) continue;
      const float values[2] = {sum[i], sum[i + 1]};
      if (out.plain()) {
        out.update(row, column, scale, values);
      } else if (!swiglu) {
        dot += out.swiglu_backward(row, column, scale, values);
      } else if (i < kHalf) {
        out.swiglu(row, column, scale, values, {sum[i % kHalf + kHalf], sum[i % kHalf + kHalf + 1]});
      }
    }
    if (p.epilogue.dots == nullptr) continue;  // all threads or none
    dot += shuffle_xor(dot, 1);
    dot += shuffle_xor(dot, 2);
    if (present && lane_id() % 4 == 0) out.store_dot(row, tile.column, kColumns, dot);
  }
}
template <int kColumns>
DEVICE_FN void store_tile(const GemmLaunch& p, const GemmTile& tile, int consumer, const float (&sum)[kColumns / 2]) {
  if (p.c_type == DType::kBF16) {
    store_tile<bf16, kColumns>(p, tile, tile.row + consumer * 64, sum);
  } else {
    store_tile<float, kColumns>(p, tile, tile.row + consumer * 64, sum);
  }
}

#endif

}  // namespace wgmma
}  // namespace lightmoe::LIGHTMOE_DEVICE
