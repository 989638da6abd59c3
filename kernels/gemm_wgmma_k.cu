// GroupedGemmK of gemm.h on Hopper's tensor cores (sm_90a): C_g = sum over the rows i of group g of A[i,:]^T B[i,:]. Both operands lie
// across k, which wgmma takes as they are (MN-major). A group's last rows seldom fill a step of k, and rows may be gathered, so a warpgroup
// copies them by cp.async, zeros behind the group's end, laid out as TMA's 128-byte swizzle would: boxes of 64 columns, [k][column].
// Blocks are persistent: each takes every gridDim-th tile, and copies for the next one run while this one is written.

#include "kernels/gemm_wgmma_tiles.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

using namespace wgmma;

#ifdef LIGHTMOE_HOPPER_CODE

// One operand's part of a step: kDepth rows of kWidth columns. A thread copies the same 16 bytes of several rows.
template <int kWidth>
struct Columns {
  static constexpr int kPieces = kWidth / 8, kRowStep = kWarpgroup / kPieces, kMine = kDepth / kRowStep;
  const GemmOperand& x;
  int row, bytes;  // the first row of mine, and how many of my 16 bytes exist
  int place;       // in elements, of piece and box; the row adds to it

  DEVICE_FN Columns(const GemmOperand& operand, int columns, int first)
      : x(operand), row(static_cast<int>(threadIdx.x) / kPieces) {
    const int piece = static_cast<int>(threadIdx.x) % kPieces;
    bytes = std::clamp(columns - first - piece * 8, 0, 8) * 2;
    column_ = first + piece * 8;
    place = piece / 8 * kBoxElements;
    piece_ = piece % 8;
  }
  DEVICE_FN void copy(bf16* to, const DepthCursor<kDepth>& depth) const {
    const bf16* data = static_cast<const bf16*>(x.data);
#pragma unroll 4
    for (int i = 0; i < kMine; ++i) {
      const int k = row + i * kRowStep;
      const bool present = bytes > 0 && depth.k + k < depth.end;
      ptx::cp_async_16(to + place + k * kDepth + (piece_ ^ k % 8) * 8,
                       data + (present ? row_start(x, depth.k + k) + column_ : 0), present ? bytes : 0);
    }
  }

 private:
  int column_, piece_;
};

template <int kColumns>
DEVICE_FN void produce(const GemmLaunch& p, Shared<kColumns>& shared, int tiles) {
  Ring ring, landing;
  int in_flight = 0;
  const auto landed = [&] {
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&shared.full[landing.stage]);
    landing.next();
    --in_flight;
  };
  for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
    const GemmTile tile = find_tile<kRows, kColumns>(p, t);
    const Columns<kRows> a(p.a, p.m, tile.row);
    const Columns<kColumns> b(p.b, p.n, tile.column);
    for (DepthCursor<kDepth> depth(p, tile); !depth.done(); depth.next(), ring.next()) {
      ptx::mbarrier_wait(&shared.free[ring.stage], ring.parity ^ 1);
      a.copy(shared.a[ring.stage], depth);
      b.copy(shared.b[ring.stage], depth);
      ptx::cp_async_commit();
      if (++in_flight > kLag) {
        ptx::cp_async_wait<kLag>();
        landed();
      }
    }
  }
  ptx::cp_async_wait<0>();
  while (in_flight > 0) landed();
}

template <int kColumns>
DEVICE_FN void multiply_stage(float (&sum)[kColumns / 2], const bf16* a, const bf16* b) {
  constexpr uint32_t kBoxBytes = kBoxElements * sizeof(bf16);
  const uint64_t da = ptx::wgmma_descriptor_mn_major(a, kBoxBytes), db = ptx::wgmma_descriptor_mn_major(b, kBoxBytes);
#pragma unroll
  for (int i = 0; i < kDepth / 16; ++i) {
    if constexpr (kColumns == 128) {
      ptx::wgmma_m64n128k16_bf16<1, 1>(sum, da + 128 * i, db + 128 * i, 1);
    } else {
      ptx::wgmma_m64n256k16_bf16<1, 1>(sum, da + 128 * i, db + 128 * i, 1);
    }
  }
}

template <int kColumns>
DEVICE_FN void consume(const GemmLaunch& p, Shared<kColumns>& shared, int tiles, int consumer) {
  Ring ring;
  for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
    const GemmTile tile = find_tile<kRows, kColumns>(p, t);
    float sum[kColumns / 2] = {};  // what groups without rows get
    int previous = -1;
    for (DepthCursor<kDepth> depth(p, tile); !depth.done(); depth.next(), ring.next()) {
      ptx::mbarrier_wait(&shared.full[ring.stage], ring.parity);
      ptx::wgmma_fence_registers(sum);
      ptx::wgmma_fence();
      multiply_stage<kColumns>(sum, shared.a[ring.stage] + consumer * kBoxElements, shared.b[ring.stage]);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // all but this step's are complete: the stage before is free
      ptx::wgmma_fence_registers(sum);
      if (previous >= 0) release(&shared.free[previous]);
      previous = ring.stage;
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_registers(sum);
    if (previous >= 0) release(&shared.free[previous]);
    store_tile<kColumns>(p, tile, consumer, sum);
  }
}

#endif

template <int kColumns>
__global__ void __launch_bounds__(kThreads, 1) gemm_wgmma_k_kernel(const __grid_constant__ GemmLaunch p, int tiles) {
#ifdef LIGHTMOE_HOPPER_CODE
  auto& shared = shared_memory<Shared<kColumns>>();
  prepare_ring(shared, kWarpgroup);
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (warpgroup == 0) {
    ptx::decrease_registers<kProducerRegisters>();
    produce(p, shared, tiles);
  } else {
    ptx::increase_registers<kConsumerRegisters>();
    consume(p, shared, tiles, warpgroup - 1);
  }
#endif
}

template <int kColumns>
void multiply_tiles(const GemmLaunch& p) {
  const int tiles = static_cast<int>(tiles_of(p, kRows, kColumns));
  launch<gemm_wgmma_k_kernel<kColumns>>({.blocks = {static_cast<uint32_t>(std::min(tiles, multiprocessors()))},
                                         .threads = {kThreads},
                                         .shared_bytes = sizeof(Shared<kColumns>)},
                                        p, tiles);
}

}  // namespace

void multiply_k_wgmma(const std::vector<GemmLaunch>& launches) {
  for (const GemmLaunch& p : launches) {
    const bool wide = p.n > 192 && tiles_of(p, kRows, 256) >= multiprocessors();
    wide ? multiply_tiles<256>(p) : multiply_tiles<128>(p);
  }
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
