// gemm.h on the tensor cores of sm_80 and later: mma.sync m16n8k16 on bf16 factors, f32 sums in ascending k. Tiles of A and B reach shared
// memory by cp.async, several steps of k ahead of the arithmetic; f32 operands, which have to be rounded on the way, pass through
// registers: read before a step's arithmetic, stored after it. Either operand may be stored along k or across it: ldmatrix reads the
// first as it is and transposes the second. Rows of A (and of B in kGroupedK) are gathered by the addresses the copies start from.

#include "kernels/device/vector.h"
#include "kernels/gemm_tiles.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kDepth = 32;   // k of one stage
constexpr int kPadding = 8;  // elements; makes the 8 rows of an ldmatrix fall into different banks

template <int kRowsOfTile, int kColumnsOfTile, int kWarpsDownTile, int kWarpsAcrossTile, int kNumStages>
struct Tiling {
  static constexpr int kRows = kRowsOfTile, kColumns = kColumnsOfTile, kStages = kNumStages;
  static constexpr int kWarpsDown = kWarpsDownTile, kWarpsAcross = kWarpsAcrossTile;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kWarpRows = kRows / kWarpsDown, kWarpColumns = kColumns / kWarpsAcross;
  static constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;  // fragments of C in a warp
};
using SmallTiles = Tiling<64, 64, 2, 2, 4>;
using LargeTiles = Tiling<128, 128, 2, 4, 3>;

// One operand of one stage: [row of op(A) or column of op(B)][k] where stored rows run along k, else [k][row or column].
template <int kExtent, bool kAlongK>
struct StagePart {
  static constexpr int kLines = kAlongK ? kExtent : kDepth, kLine = kAlongK ? kDepth : kExtent;
  bf16 at[kLines][kLine + kPadding];
};

template <class Tiles, bool kAAlongK, bool kBAlongK>
struct Shared {
  StagePart<Tiles::kRows, kAAlongK> a[Tiles::kStages];
  StagePart<Tiles::kColumns, kBAlongK> b[Tiles::kStages];
  float dots[Tiles::kWarpsAcross][Tiles::kRows];  // of an epilogue
};

// Brings one operand's part of a stage in pieces of 8 elements, zeros outside [begin, end) and outside the step of k.
template <class T, int kExtent, bool kAlongK, int kThreads>
struct Loader {
  using Part = StagePart<kExtent, kAlongK>;
  static constexpr int kAcross = Part::kLine / 8, kPieces = Part::kLines * kAcross / kThreads;
  const GemmOperand& x;
  const T* data;
  int begin, end;
  int64_t start[kPieces];   // of the stored rows of my pieces
  Floats<8> held[kPieces];  // f32 on its way

  // row_of(line): the stored row of a line of the tile, -1: none.
  template <class RowOf>
  DEVICE_FN Loader(const GemmOperand& operand, const void* matrix, int from, int to, const RowOf& row_of)
      : x(operand), data(static_cast<const T*>(matrix)), begin(from), end(to) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int row = kAlongK ? row_of(line(j)) : -1;
      start[j] = row >= 0 ? row_start(x, row) : -1;
    }
  }
  DEVICE_FN static int line(int j) { return (static_cast<int>(threadIdx.x) + j * kThreads) / kAcross; }
  DEVICE_FN static int column() { return static_cast<int>(threadIdx.x) % kAcross * 8; }

  // Finds the rows of the step to fetch next: early, because a gathered row takes a load to find.
  DEVICE_FN void aim(const DepthCursor<kDepth>& depth) {
    if constexpr (!kAlongK) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) start[j] = depth.k + line(j) < depth.end ? row_start(x, depth.k + line(j)) : -1;
    }
  }
  DEVICE_FN void fetch(const DepthCursor<kDepth>& depth, Part& part) {
    const int first = (kAlongK ? depth.k : begin) + column(), last = kAlongK ? depth.end : end;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const bool present = start[j] >= 0;
      if constexpr (std::is_same_v<T, bf16>) {
        const int count = present ? std::clamp(last - first, 0, 8) : 0;
        ptx::cp_async_16(&part.at[line(j)][column()], data + (count > 0 ? start[j] + first : 0), count * 2);
      } else {
        held[j] = load_floats<8>(data + (present ? start[j] : 0), first, present ? last : 0, true);
      }
    }
  }
  DEVICE_FN void put(Part& part) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) store_16(&part.at[line(j)][column()], pack(held[j].v, &part.at[0][0]));
    }
  }
};

// Fragments for mma: 16 rows of op(A) and 16 of k, or 16 columns of op(B) (two fragments of 8) and 16 of k.
template <class Part, bool kAlongK>
DEVICE_FN void load_a(uint32_t (&fragment)[4], const Part& part, int row, int k) {
  const int lane = lane_id();
  if constexpr (kAlongK) {
    ptx::ldmatrix_x4(fragment, &part.at[row + lane % 16][k + lane / 16 * 8]);
  } else {
    ptx::ldmatrix_x4_trans(fragment, &part.at[k + lane / 16 * 8 + lane % 8][row + lane / 8 % 2 * 8]);
  }
}
template <class Part, bool kAlongK>
DEVICE_FN void load_b(uint32_t (&fragments)[4], const Part& part, int column, int k) {
  const int lane = lane_id();
  if constexpr (kAlongK) {
    ptx::ldmatrix_x4(fragments, &part.at[column + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
  } else {
    ptx::ldmatrix_x4_trans(fragments, &part.at[k + lane / 8 % 2 * 8 + lane % 8][column + lane / 16 * 8]);
  }
}

template <class Tiles, bool kAAlongK, bool kBAlongK>
DEVICE_FN void multiply_stage(float (&sum)[Tiles::kDown][Tiles::kAcross][4],
                              const StagePart<Tiles::kRows, kAAlongK>& stage_a,
                              const StagePart<Tiles::kColumns, kBAlongK>& stage_b, int warp_row, int warp_column) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[Tiles::kDown][4];
#pragma unroll
    for (int i = 0; i < Tiles::kDown; ++i) {
      load_a<StagePart<Tiles::kRows, kAAlongK>, kAAlongK>(a[i], stage_a, warp_row + i * 16, k);
    }
#pragma unroll
    for (int j = 0; j < Tiles::kAcross; j += 2) {
      uint32_t b[4];
      load_b<StagePart<Tiles::kColumns, kBAlongK>, kBAlongK>(b, stage_b, warp_column + j * 8, k);
#pragma unroll
      for (int i = 0; i < Tiles::kDown; ++i) {
        ptx::mma_m16n8k16_bf16(sum[i][j], a[i], {b[0], b[1]});
        ptx::mma_m16n8k16_bf16(sum[i][j + 1], a[i], {b[2], b[3]});
      }
    }
  }
}

// The epilogue of a warp's part of the tile. Runs of 8 columns of gate and of up take turns in it (row_of_b).
constexpr int kRun = 8;
template <class C, class Tiles>
DEVICE_FN void store_tile(const GemmLaunch& p, const GemmTile& tile, int warp_row, int warp_column,
                          const float (&sum)[Tiles::kDown][Tiles::kAcross][4], float (&dots)[Tiles::kRows]) {
  const TileOutput<C> out(p, tile.c);
  const bool swiglu = p.epilogue.swiglu();
#pragma unroll
  for (int i = 0; i < Tiles::kDown; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int in_tile = warp_row + i * 16 + half * 8 + lane_id() / 4, row = tile.row + in_tile;
      const bool present = row < tile.row_end;
      const float scale = present ? out.scale(row) : 0.0f;
      float dot = 0;
#pragma unroll
      for (int j = 0; j < Tiles::kAcross; ++j) {
        const int pair = lane_id() % 4 * 2;
        const int column =
            swiglu ? (tile.column + warp_column) / 2 + j / 2 * kRun + pair : tile.column + warp_column + j * 8 + pair;
        if (!present || column >= out.width()) continue;
        const float values[2] = {sum[i][j][2 * half], sum[i][j][2 * half + 1]};
        if (out.plain()) {
          out.update(row, column, scale, values);
        } else if (!swiglu) {
          dot += out.swiglu_backward(row, column, scale, values);
        } else if (j % 2 == 0) {
          out.swiglu(row, column, scale, values, {sum[i][j + 1][2 * half], sum[i][j + 1][2 * half + 1]});
        }
      }
      if (p.epilogue.dots == nullptr) continue;  // all threads or none
      dot += shuffle_xor(dot, 1);
      dot += shuffle_xor(dot, 2);
      if (lane_id() % 4 == 0) dots[in_tile] = dot;
    }
  }
}

// The rows' dots over the tile's warps.
template <class Tiles>
DEVICE_FN void store_dots(const GemmLaunch& p, const GemmTile& tile,
                          const float (&dots)[Tiles::kWarpsAcross][Tiles::kRows]) {
  if (p.epilogue.dots == nullptr) return;
  sync_block();
  const TileOutput<float> out(p, nullptr);
  for (int i = static_cast<int>(threadIdx.x); i < Tiles::kRows; i += Tiles::kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < Tiles::kWarpsAcross; ++w) sum += dots[w][i];
    if (tile.row + i < tile.row_end) out.store_dot(tile.row + i, tile.column, Tiles::kColumns, sum);
  }
}

template <class Tiles, class A, class B, bool kAAlongK, bool kBAlongK>
__global__ void __launch_bounds__(Tiles::kThreads) gemm_mma_kernel(const __grid_constant__ GemmLaunch p) {
  constexpr int kStages = Tiles::kStages;
  auto& shared = shared_memory<Shared<Tiles, kAAlongK, kBAlongK>>();
  const GemmTile tile = find_tile<Tiles::kRows, Tiles::kColumns>(p, static_cast<int>(blockIdx.x));
  if (tile.empty()) return;  // the whole block
  Loader<A, Tiles::kRows, kAAlongK, Tiles::kThreads> a(
      p.a, p.a.data, tile.row, tile.row_end, [&](int i) { return tile.row + i < tile.row_end ? tile.row + i : -1; });
  Loader<B, Tiles::kColumns, kBAlongK, Tiles::kThreads> b(p.b, tile.b, tile.column, p.n,
                                                          [&](int i) { return row_of_b<kRun>(p, tile.column, i); });
  DepthCursor<kDepth> ahead(p, tile), depth(p, tile);  // of the copies, of the arithmetic
  const auto aim = [&] {
    if (!ahead.done()) a.aim(ahead), b.aim(ahead);
  };
  aim();
  for (int s = 0; s < kStages - 1; ++s) {
    if (!ahead.done()) {
      a.fetch(ahead, shared.a[s]), b.fetch(ahead, shared.b[s]);
      a.put(shared.a[s]), b.put(shared.b[s]);
      ahead.next();
      aim();
    }
    ptx::cp_async_commit();
  }
  const int warp_row = warp_id() / Tiles::kWarpsAcross * Tiles::kWarpRows;
  const int warp_column = warp_id() % Tiles::kWarpsAcross * Tiles::kWarpColumns;
  float sum[Tiles::kDown][Tiles::kAcross][4] = {};
  for (int stage = 0, free = kStages - 1; !depth.done(); depth.next()) {
    ptx::cp_async_wait<kStages - 2>();
    sync_block();  // the stage is there for all, and all have left the one to be filled
    const bool more = !ahead.done();
    if (more) {
      a.fetch(ahead, shared.a[free]), b.fetch(ahead, shared.b[free]);
      ahead.next();
      aim();
    }
    multiply_stage<Tiles, kAAlongK, kBAlongK>(sum, shared.a[stage], shared.b[stage], warp_row, warp_column);
    if (more) a.put(shared.a[free]), b.put(shared.b[free]);
    ptx::cp_async_commit();
    free = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  auto& dots = shared.dots[warp_id() % Tiles::kWarpsAcross];
  if (p.c_type == DType::kBF16) {
    store_tile<bf16, Tiles>(p, tile, warp_row, warp_column, sum, dots);
  } else {
    store_tile<float, Tiles>(p, tile, warp_row, warp_column, sum, dots);
  }
  store_dots<Tiles>(p, tile, shared.dots);
}

template <class Tiles, class A, class B, bool kAAlongK, bool kBAlongK>
void multiply_tiles(const GemmLaunch& p) {
  const auto blocks = static_cast<uint32_t>(tiles_of(p, Tiles::kRows, Tiles::kColumns));
  with_dots(p, Tiles::kColumns, [&](const GemmLaunch& launched) {
    launch<gemm_mma_kernel<Tiles, A, B, kAAlongK, kBAlongK>>(
        {.blocks = {blocks}, .threads = {Tiles::kThreads}, .shared_bytes = sizeof(Shared<Tiles, kAAlongK, kBAlongK>)},
        launched);
  });
}

// Large tiles where they are full and as many as the machine has multiprocessors.
bool large(const GemmLaunch& p) {
  const int groups = p.kind == GemmKind::kGroupedM ? p.num_groups : 1;
  return p.m / groups >= LargeTiles::kRows * 3 / 4 && p.n >= LargeTiles::kColumns * 3 / 4 &&
         tiles_of(p, LargeTiles::kRows, LargeTiles::kColumns) >= multiprocessors();
}

template <class A, class B>
void multiply_as(const GemmLaunch& p) {
  const auto with = [&]<bool kAAlongK, bool kBAlongK>() {
    if constexpr (std::is_same_v<A, bf16> && std::is_same_v<B, bf16>) {
      if (large(p)) return multiply_tiles<LargeTiles, A, B, kAAlongK, kBAlongK>(p);
    }
    multiply_tiles<SmallTiles, A, B, kAAlongK, kBAlongK>(p);
  };
  if (p.trans_a) return with.template operator()<false, false>();
  if (p.trans_b) return with.template operator()<true, true>();
  with.template operator()<true, false>();
}

void multiply(const std::vector<GemmLaunch>& launches) {
  for (const GemmLaunch& p : launches) {
    visit_device_floating("gemm", p.a_type, [&]<class A>() {
      visit_device_floating("gemm", p.b_type, [&]<class B>() { multiply_as<A, B>(p); });
    });
  }
}

// Both operands transposed: nobody asks for it. Rows must start where 16-byte copies may.
bool supports(const GemmDesc& desc) {
  const bool bf16_factors = desc.compute == GemmCompute::kBF16 || (desc.a == DType::kBF16 && desc.b == DType::kBF16);
  return desc.device == kDevice && desc.c != DType::kF64 && bf16_factors && desc.alignment == 16 &&
         !(desc.trans_a && desc.trans_b);
}
double cost(const GemmDesc& desc) {
  constexpr double kLaunch = 4, kFlopsPerMicrosecond = 2.5e8, kBytesPerMicrosecond = 2e6;
  return kLaunch + std::max(tiled_flops(desc, SmallTiles::kRows, SmallTiles::kColumns) / kFlopsPerMicrosecond,
                            bytes_moved(desc) / kBytesPerMicrosecond);
}

const RegisterGemmBackend mma{{
    .name = "mma",
    .supports = &supports,
    .cost = &cost,
    .dense = [](const Gemm& op) { multiply(launches_of(op)); },
    .grouped_m = [](const GroupedGemmM& op) { multiply(launches_of(op)); },
    .grouped_k = [](const GroupedGemmK& op) { multiply(launches_of(op)); },
}};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
