#pragma once
// What the attention kernels on Hopper's wgmma share (attention_wgmma.cu, attention_wgmma_backward.cu). A block is one warpgroup that brings
// tiles and two that multiply, 64 rows each. A tile of rows lies in shared memory as boxes of 64 columns in TMA's 128-byte swizzle, so that
// it serves as an operand along its columns (scores) and along its rows (sums over rows) alike. Whole tiles come by TMA; the last one of a
// sequence, behind which another's rows may lie, is copied with zeros in the rows that are not its own.
// Of D (64 x N) a thread holds elements 4 j + 2 i + c: row 16 (warp % 4) + lane / 4 + 8 i, column 8 j + 2 (lane % 4) + c.

#include "kernels/attention_device.h"
#include "kernels/device/stage_ring.h"

namespace lightmoe::LIGHTMOE_DEVICE {

namespace attention_wgmma {

constexpr int kWarpgroup = 128, kConsumers = 2, kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kOwn = 64 * kConsumers;  // rows of a block
constexpr int kBox = 64;               // columns: 128 bytes

template <int kRows, int kWidth>
struct Tile {
  alignas(1024) bf16 box[kWidth / kBox][kRows * kBox];
};

// A matrix of rows as the kernel gets it. Its boxes have as many rows as the tiles.
struct Source {
  TensorMap map;
  const bf16* data;
  int64_t stride;  // elements
};
inline Source source_of(const Tensor& t, int tile_rows) {
  const int64_t rows = t.dim(0), columns = t.dim(1);
  return {make_tensor_map({t.raw(), rows, columns, columns * static_cast<int64_t>(sizeof(bf16)), tile_rows, kBox}),
          t.data<bf16>(), columns};
}

// bf16, head_dim 64 or 128, one query head a key head, compute capability 9.0.
inline bool takes(int64_t head_dim, const AttentionSizes& n, std::initializer_list<const Tensor*> tensors) {
  const auto fits = [](const Tensor* t) {
    return t->dtype() == DType::kBF16 && reinterpret_cast<uintptr_t>(t->raw()) % 16 == 0 && t->dim(0) > 0;
  };
  return (head_dim == 64 || head_dim == 128) && n.group == 1 && compute_capability() == 90 &&
         std::all_of(tensors.begin(), tensors.end(), fits);
}

#ifdef LIGHTMOE_HOPPER_CODE

constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kProducerBarrier = 1;
constexpr float kLog2E = 1.44269504f;

// All threads, before the warpgroups part.
template <int kStages>
DEVICE_FN void prepare_barriers(uint64_t* own, uint64_t (&full)[kStages], uint64_t (&free)[kStages]) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(own, 1);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&free[s], 4 * kConsumers);  // one arrival of each warp: wgmma_wait speaks for its own
    }
    ptx::fence_mbarrier_init();
  }
  sync_block();
}
// What the warp's lanes read themselves comes before the arrival of one of them.
DEVICE_FN void release(uint64_t* free) {
  sync_warp();
  if (lane_id() == 0) ptx::mbarrier_arrive(free);
}

// By the whole producer warpgroup: rows `first` to `first + kRows` of the source, columns from `column` on; zeros from row first + count on.
template <int kRows, int kWidth>
DEVICE_FN void copy_tile(Tile<kRows, kWidth>& to, const Source& from, int first, int column, int count) {
  constexpr int kPieces = kWidth / 8;  // of 16 bytes
  const bf16* data = from.data + first * from.stride + column;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kWarpgroup) {
    const int row = i / kPieces, piece = i % kPieces;
    bf16* place = &to.box[piece / 8][row * kBox + (piece % 8 ^ row % 8) * 8];
    ptx::cp_async_16(place, row < count ? data + row * from.stride + piece * 8 : from.data, row < count ? 16 : 0);
  }
}
template <int kRows, int kWidth>
DEVICE_FN void load_tile_by_tma(Tile<kRows, kWidth>& to, const Source& from, int first, int column, uint64_t* full) {
#pragma unroll
  for (int b = 0; b < kWidth / kBox; ++b) ptx::tma_load_2d(to.box[b], from.map, column + b * kBox, first, full);
}

DEVICE_FN void finish_copies(uint64_t* full) {
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_proxy_async();
  ptx::barrier_sync(kProducerBarrier, kWarpgroup);
  if (threadIdx.x == 0) ptx::mbarrier_arrive(full);
}

// One tile, or two of the same rows, on one barrier.
template <int kRows, int kWidth>
DEVICE_FN void bring(Tile<kRows, kWidth>& to, const Source& from, int first, int column, int count, uint64_t* full) {
  if (count >= kRows) {
    if (threadIdx.x != 0) return;
    ptx::mbarrier_arrive_expect_bytes(full, sizeof(to.box));
    return load_tile_by_tma(to, from, first, column, full);
  }
  copy_tile(to, from, first, column, count);
  finish_copies(full);
}
template <int kRows, int kWidth>
DEVICE_FN void bring(Tile<kRows, kWidth> (&to)[2], const Source& from0, const Source& from1, int first, int column,
                     int count, uint64_t* full) {
  if (count >= kRows) {
    if (threadIdx.x != 0) return;
    ptx::mbarrier_arrive_expect_bytes(full, 2 * sizeof(to[0].box));
    load_tile_by_tma(to[0], from0, first, column, full);
    return load_tile_by_tma(to[1], from1, first, column, full);
  }
  copy_tile(to[0], from0, first, column, count);
  copy_tile(to[1], from1, first, column, count);
  finish_copies(full);
}

// d (64 x kN) = rows `row` to `row + 64` of a, times b^T.
template <int kN, int kRows, int kWidth>
DEVICE_FN void multiply_transposed(float (&d)[kN / 2], const Tile<kRows, kWidth>& a, int row,
                                   const Tile<kN, kWidth>& b) {
#pragma unroll
  for (int box = 0; box < kWidth / kBox; ++box) {
    const uint64_t da = ptx::wgmma_descriptor_k_major(a.box[box] + row * kBox),
                   db = ptx::wgmma_descriptor_k_major(b.box[box]);
#pragma unroll
    for (int i = 0; i < kBox / 16; ++i) {  // 16 columns are 32 bytes
      const int accumulate = box == 0 && i == 0 ? 0 : 1;
      if constexpr (kN == 64) {
        ptx::wgmma_m64n64k16_bf16(d, da + 2 * i, db + 2 * i, accumulate);
      } else {
        ptx::wgmma_m64n128k16_bf16(d, da + 2 * i, db + 2 * i, accumulate);
      }
    }
  }
}

// d (64 x kWidth) += factors (64 x kK, of registers) b.
template <int kK, int kWidth>
DEVICE_FN void add_products(float (&d)[kWidth / 2], const uint32_t (&factors)[kK / 16][4], const Tile<kK, kWidth>& b) {
  const uint64_t db = ptx::wgmma_descriptor_mn_major(b.box[0], sizeof(b.box[0]));
#pragma unroll
  for (int i = 0; i < kK / 16; ++i) {  // 16 rows are 2048 bytes
    if constexpr (kWidth == 64) {
      ptx::wgmma_m64n64k16_bf16<1>(d, factors[i], db + 128 * i, 1);
    } else {
      ptx::wgmma_m64n128k16_bf16<1>(d, factors[i], db + 128 * i, 1);
    }
  }
}

// An accumulator as the left factor of the next product, rounded to bf16.
template <int kN>
DEVICE_FN void to_factors(uint32_t (&factors)[kN / 16][4], const float (&d)[kN / 2]) {
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) factors[i / 4][i % 4] = pack_bf16(d[2 * i], d[2 * i + 1]);
}

#endif

}  // namespace attention_wgmma
}  // namespace lightmoe::LIGHTMOE_DEVICE
