// gemm.h on Hopper's tensor cores (sm_90a): wgmma on bf16 operands that TMA brought, f32 sums in ascending k. A block is persistent: it
// takes every gridDim-th tile of C. One warpgroup feeds a ring of stages, two multiply, 64 rows of the tile each, so that the copies for the
// next tile run while this one is written. Rows of A that are gathered come by cp.async, 16 bytes at a time, laid out as TMA's 128-byte
// swizzle would; as those are ordinary writes to shared memory, the thread that issued them waits for them and passes the proxy fence
// before it says so on the stage's barrier. Otherwise one thread issues a box of A and one of B for each stage.
// Each group's matrix has a tensor map; all travel in the kernel's parameters (up to 17 KB: drivers of CUDA 12.1 and later).

#include "kernels/gemm_wgmma_tiles.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

using namespace wgmma;

struct Maps {
  TensorMap a, b[kMaxLaunchGroups];
};

#ifdef LIGHTMOE_HOPPER_CODE

// Where B's rows run along k, the tile is two halves: of SwiGLU's the same columns of gate and of up.
template <int kColumns, bool kBAlongK>
DEVICE_FN void load_b(bf16* to, const TensorMap& map, int k, const GemmLaunch& p, int column, uint64_t* full) {
  if constexpr (kBAlongK) {
    const bool swiglu = p.epilogue.swiglu();
    ptx::tma_load_2d(to, map, k, swiglu ? column / 2 : column, full);
    ptx::tma_load_2d(to + kColumns / 2 * kDepth, map, k, swiglu ? (p.n + column) / 2 : column + kColumns / 2, full);
  } else {
#pragma unroll
    for (int box = 0; box < kColumns / kDepth; ++box) {
      ptx::tma_load_2d(to + box * kBoxElements, map, column + box * kDepth, k, full);
    }
  }
}

template <int kColumns, bool kBAlongK>
DEVICE_FN void produce(const GemmLaunch& p, const Maps& maps, Shared<kColumns>& shared, int tiles) {
  if (warp_id() != 0) return;
  constexpr uint32_t kBytes = (kRows + kColumns) * kDepth * sizeof(bf16);
  Ring ring;
  for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
    const GemmTile tile = find_tile<kRows, kColumns>(p, t);
    if (tile.empty()) break;
    for (int k = 0; k < p.k; k += kDepth, ring.next()) {
      ptx::mbarrier_wait(&shared.free[ring.stage], ring.parity ^ 1);
      if (lane_id() != 0) continue;
      uint64_t* full = &shared.full[ring.stage];
      ptx::mbarrier_arrive_expect_bytes(full, kBytes);
      ptx::tma_load_2d(shared.a[ring.stage], maps.a, k, tile.row, full);
      load_b<kColumns, kBAlongK>(shared.b[ring.stage], maps.b[tile.group], k, p, tile.column, full);
    }
  }
}

// Where A's rows are gathered, all threads of the warpgroup copy: each the same 16 bytes of every 16th row.
template <int kColumns, bool kBAlongK>
DEVICE_FN void produce_gathered(const GemmLaunch& p, const Maps& maps, Shared<kColumns>& shared, int tiles) {
  constexpr int kPieces = kDepth / 8, kRowStep = kWarpgroup / kPieces, kMine = kRows / kRowStep;
  constexpr uint32_t kBytes = kColumns * kDepth * sizeof(bf16);
  const int thread = static_cast<int>(threadIdx.x), row = thread / kPieces, piece = thread % kPieces;
  const int place = row * kDepth + (piece ^ row % 8) * 8;  // swizzled
  const bf16* data = static_cast<const bf16*>(p.a.data);
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
    if (tile.empty()) break;
    int64_t start[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int r = tile.row + row + i * kRowStep;
      start[i] = r < tile.row_end ? row_start(p.a, r) : -1;
    }
    for (int k = 0; k < p.k; k += kDepth, ring.next()) {
      ptx::mbarrier_wait(&shared.free[ring.stage], ring.parity ^ 1);
      if (thread == 0) {
        ptx::mbarrier_arrive_expect_bytes(&shared.full[ring.stage], kBytes);
        load_b<kColumns, kBAlongK>(shared.b[ring.stage], maps.b[tile.group], k, p, tile.column,
                                   &shared.full[ring.stage]);
      }
      const int column = k + piece * 8, count = std::clamp(p.k - column, 0, 8);
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const bool present = start[i] >= 0 && count > 0;
        ptx::cp_async_16(&shared.a[ring.stage][place + i * kRowStep * kDepth], data + (present ? start[i] + column : 0),
                         present ? count * 2 : 0);
      }
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

template <int kColumns, bool kBAlongK>
DEVICE_FN void multiply_stage(float (&sum)[kColumns / 2], const bf16* a, const bf16* b, bool first) {
  const uint64_t da = ptx::wgmma_descriptor_k_major(a);
  const uint64_t db =
      kBAlongK ? ptx::wgmma_descriptor_k_major(b) : ptx::wgmma_descriptor_mn_major(b, kBoxElements * sizeof(bf16));
  constexpr int kStepA = 2, kStepB = kBAlongK ? 2 : 128;  // 16 of k further, in the descriptor's 16 bytes
#pragma unroll
  for (int i = 0; i < kDepth / 16; ++i) {
    const int accumulate = first && i == 0 ? 0 : 1;
    if constexpr (kColumns == 128) {
      ptx::wgmma_m64n128k16_bf16<!kBAlongK>(sum, da + kStepA * i, db + kStepB * i, accumulate);
    } else {
      ptx::wgmma_m64n256k16_bf16<!kBAlongK>(sum, da + kStepA * i, db + kStepB * i, accumulate);
    }
  }
}

template <int kColumns, bool kBAlongK>
DEVICE_FN void consume(const GemmLaunch& p, Shared<kColumns>& shared, int tiles, int consumer) {
  Ring ring;
  for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
    const GemmTile tile = find_tile<kRows, kColumns>(p, t);
    if (tile.empty()) break;
    float sum[kColumns / 2];
    int previous = -1;
    for (int k = 0; k < p.k; k += kDepth, ring.next()) {
      ptx::mbarrier_wait(&shared.full[ring.stage], ring.parity);
      ptx::wgmma_fence_registers(sum);
      ptx::wgmma_fence();
      multiply_stage<kColumns, kBAlongK>(sum, shared.a[ring.stage] + consumer * kBoxElements, shared.b[ring.stage],
                                         k == 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // all but this step's are complete: the stage before is free
      ptx::wgmma_fence_registers(sum);
      if (previous >= 0) release(&shared.free[previous]);
      previous = ring.stage;
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_registers(sum);
    release(&shared.free[previous]);
    store_tile<kColumns>(p, tile, consumer, sum);
  }
}

#endif

template <int kColumns, bool kGather, bool kBAlongK>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_wgmma_kernel(const __grid_constant__ GemmLaunch p, const __grid_constant__ Maps maps, int tiles) {
#ifdef LIGHTMOE_HOPPER_CODE
  auto& shared = shared_memory<Shared<kColumns>>();
  prepare_ring(shared, kGather ? kWarpgroup + 1 : 1);
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (warpgroup == 0) {
    ptx::decrease_registers<kProducerRegisters>();
    if constexpr (kGather) {
      produce_gathered<kColumns, kBAlongK>(p, maps, shared, tiles);
    } else {
      produce<kColumns, kBAlongK>(p, maps, shared, tiles);
    }
  } else {
    ptx::increase_registers<kConsumerRegisters>();
    consume<kColumns, kBAlongK>(p, shared, tiles, warpgroup - 1);
  }
#endif
}

template <int kColumns>
TensorMap map_of_b(const GemmLaunch& p, const void* matrix) {
  const int64_t row_bytes = p.b.stride * static_cast<int64_t>(sizeof(bf16));
  if (p.trans_b) return make_tensor_map({matrix, p.n, p.k, row_bytes, kColumns / 2, kDepth});
  return make_tensor_map({matrix, p.k, p.n, row_bytes, kDepth, kDepth});
}

template <int kColumns>
void multiply_tiles(const GemmLaunch& p) {
  Maps maps{};
  if (p.a.rows == nullptr) {
    maps.a = make_tensor_map({p.a.data, p.m, p.k, p.a.stride * static_cast<int64_t>(sizeof(bf16)), kRows, kDepth});
  }
  if (p.kind == GemmKind::kDense) maps.b[0] = map_of_b<kColumns>(p, p.b.data);
  for (int g = 0; g < p.num_groups; ++g) {
    if (p.group_data[g] != nullptr) maps.b[g] = map_of_b<kColumns>(p, p.group_data[g]);
  }
  const int tiles = static_cast<int>(tiles_of(p, kRows, kColumns));
  const Launch config{.blocks = {static_cast<uint32_t>(std::min(tiles, multiprocessors()))},
                      .threads = {kThreads},
                      .shared_bytes = sizeof(Shared<kColumns>)};
  with_dots(p, kColumns, [&](const GemmLaunch& launched) {
    const auto with = [&]<bool kGather>() {
      if (p.trans_b) return launch<gemm_wgmma_kernel<kColumns, kGather, true>>(config, launched, maps, tiles);
      launch<gemm_wgmma_kernel<kColumns, kGather, false>>(config, launched, maps, tiles);
    };
    if (p.a.rows != nullptr) return with.template operator()<true>();
    with.template operator()<false>();
  });
}

void multiply(const std::vector<GemmLaunch>& launches) {
  for (const GemmLaunch& p : launches) {
    const bool wide = p.n > 192 && tiles_of(p, kRows, 256) >= multiprocessors();
    wide ? multiply_tiles<256>(p) : multiply_tiles<128>(p);
  }
}

// Dense products with A^T are nobody's weight gradient here (those are GroupedGemmK's). sm_90a code runs on compute capability 9.0 only.
bool supports(const GemmDesc& desc) {
  return desc.device == kDevice && (desc.kind == GemmKind::kGroupedK || (!desc.trans_a && desc.k > 0)) &&
         desc.a == DType::kBF16 && desc.b == DType::kBF16 && desc.c != DType::kF64 && desc.alignment == 16 &&
         compute_capability() == 90;
}
double cost(const GemmDesc& desc) {
  constexpr double kLaunch = 6, kFlopsPerMicrosecond = 6e8, kBytesPerMicrosecond = 3e6;
  return kLaunch +
         std::max(tiled_flops(desc, kRows, 128) / kFlopsPerMicrosecond, bytes_moved(desc) / kBytesPerMicrosecond);
}

const RegisterGemmBackend registered{{
    .name = "wgmma",
    .supports = &supports,
    .cost = &cost,
    .dense = [](const Gemm& op) { multiply(launches_of(op)); },
    .grouped_m = [](const GroupedGemmM& op) { multiply(launches_of(op)); },
    .grouped_k = [](const GroupedGemmK& op) { multiply_k_wgmma(launches_of(op)); },
}};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
