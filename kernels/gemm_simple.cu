// gemm.h in its plainest GPU form: one tile of A and of B in shared memory, every thread 4 x 4 elements of C in registers. It takes every
// product the header allows, at any alignment: what the faster backends leave, and what they are compared with. Sums run in ascending k,
// in f32 (f64 for f64), whatever the shape.

#include "kernels/device/numeric.h"
#include "kernels/gemm_tiles.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kTile = 64, kDepth = 16, kThreads = 256;
constexpr int kSide = 16, kPerThread = kTile / kSide;  // threads stand in a square; each owns every 16th row and column

template <class Compute>
struct Shared {  // [k][row of C], [k][column of C]; the padding spreads a column over the banks
  Compute a[kDepth][kTile + 1], b[kDepth][kTile + 1];
};

template <class Compute, class T>
DEVICE_FN Compute factor(T value, bool round) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return round ? to_float(from_float<bf16>(to_float(value))) : to_float(value);
  }
}

// to[k][i] = X at (row_of(i), k) for a tile of X's rows (columns for B) and this step of k; zero outside, where row_of gives -1.
// Neighbouring threads read along the stored rows, which run over k or over i.
template <class T, class Compute, class RowOf>
DEVICE_FN void load_tile(Compute (&to)[kDepth][kTile + 1], const T* data, const GemmOperand& x, bool rows_along_k,
                         const RowOf& row_of, const DepthCursor<kDepth>& depth, bool round) {
  for (int n = static_cast<int>(threadIdx.x); n < kTile * kDepth; n += kThreads) {
    const int i = rows_along_k ? n / kDepth : n % kTile, k = rows_along_k ? n % kDepth : n / kTile;
    const int at = row_of(i);
    Compute value = 0;
    if (at >= 0 && depth.k + k < depth.end) {
      const int row = rows_along_k ? at : depth.k + k, column = rows_along_k ? depth.k + k : at;
      value = factor<Compute>(data[row_start(x, row) + column], round);
    }
    to[k][i] = value;
  }
}

// C of a tile in f64.
DEVICE_FN void store_tile(const GemmLaunch& p, const GemmTile& tile, int down, int across,
                          const double (&sum)[kPerThread][kPerThread], const double*) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int row = tile.row + down + i * kSide;
    double* c = static_cast<double*>(tile.c) + row * p.c_stride;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int column = tile.column + across + j * kSide;
      if (row >= tile.row_end || column >= p.n) continue;
      c[column] = p.alpha * sum[i][j] + (p.beta != 0 ? p.beta * c[column] : 0.0);
    }
  }
}

// The epilogue of a row, by the 16 threads that share it: element by element, as this thread's columns are no neighbours.
template <class C>
DEVICE_FN void store_tile(const GemmLaunch& p, const GemmTile& tile, int down, int across,
                          const float (&sum)[kPerThread][kPerThread], const C*) {
  const TileOutput<C> out(p, tile.c);
  const bool swiglu = p.epilogue.swiglu();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int row = tile.row + down + i * kSide;
    const bool present = row < tile.row_end;
    const float scale = present ? out.scale(row) : 0.0f;
    float dot = 0;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int column = swiglu ? tile.column / 2 + across + j / 2 * kSide : tile.column + across + j * kSide;
      if (!present || column >= out.width()) continue;
      if (out.plain()) {
        out.template update<1>(row, column, scale, {sum[i][j]});
      } else if (!swiglu) {
        dot += out.template swiglu_backward<1>(row, column, scale, {sum[i][j]});
      } else if (j % 2 == 0) {
        out.template swiglu<1>(row, column, scale, {sum[i][j]}, {sum[i][j + 1]});
      }
    }
    if (p.epilogue.dots == nullptr) continue;  // all threads or none
#pragma unroll
    for (int distance = kSide / 2; distance > 0; distance /= 2) dot += shuffle_xor(dot, distance);
    if (present && across == 0) out.store_dot(row, tile.column, kTile, dot);
  }
}

template <class A, class B, class C>
__global__ void __launch_bounds__(kThreads) gemm_simple_kernel(const __grid_constant__ GemmLaunch p) {
  using Compute = compute_t<C>;
  auto& shared = shared_memory<Shared<Compute>>();
  const GemmTile tile = find_tile<kTile, kTile>(p, static_cast<int>(blockIdx.x));
  if (tile.empty()) return;  // the whole block
  const int down = static_cast<int>(threadIdx.x) / kSide, across = static_cast<int>(threadIdx.x) % kSide;
  Compute sum[kPerThread][kPerThread] = {};
  for (DepthCursor<kDepth> depth(p, tile); !depth.done(); depth.next()) {
    const auto row_of_a = [&](int i) { return tile.row + i < tile.row_end ? tile.row + i : -1; };
    const auto row_of_column = [&](int i) { return row_of_b<kSide>(p, tile.column, i); };
    load_tile(shared.a, static_cast<const A*>(p.a.data), p.a, !p.trans_a, row_of_a, depth, p.round);
    load_tile(shared.b, static_cast<const B*>(tile.b), p.b, p.trans_b, row_of_column, depth, p.round);
    sync_block();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      Compute a[kPerThread], b[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        a[i] = shared.a[k][down + i * kSide];
        b[i] = shared.b[k][across + i * kSide];
      }
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) sum[i][j] += a[i] * b[j];
      }
    }
    sync_block();
  }
  store_tile(p, tile, down, across, sum, static_cast<const C*>(nullptr));
}

template <class A, class B, class C>
void multiply_as(const GemmLaunch& p) {
  const auto blocks = static_cast<uint32_t>(tiles_of(p, kTile, kTile));
  with_dots(p, kTile, [&](const GemmLaunch& launched) {
    launch<gemm_simple_kernel<A, B, C>>(
        {.blocks = {blocks}, .threads = {kThreads}, .shared_bytes = sizeof(Shared<compute_t<C>>)}, launched);
  });
}

void multiply(const std::vector<GemmLaunch>& launches) {
  for (const GemmLaunch& p : launches) {
    if (p.c_type == DType::kF64) {
      multiply_as<double, double, double>(p);
      continue;
    }
    visit_device_floating("gemm", p.a_type, [&]<class A>() {
      visit_device_floating("gemm", p.b_type, [&]<class B>() {
        visit_device_floating("gemm", p.c_type, [&]<class C>() { multiply_as<A, B, C>(p); });
      });
    });
  }
}

bool supports(const GemmDesc& desc) {
  return desc.device == kDevice && (desc.c != DType::kF64 || desc.epilogue == GemmEpilogueKind::kNone);
}
double cost(const GemmDesc& desc) {
  constexpr double kLaunch = 4, kFlopsPerMicrosecond = 8e6;  // about a tenth of what f32 units do at best
  return kLaunch + tiled_flops(desc, kTile, kTile) / kFlopsPerMicrosecond;
}

const RegisterGemmBackend simple{{
    .name = "simple",
    .supports = &supports,
    .cost = &cost,
    .dense = [](const Gemm& op) { multiply(launches_of(op)); },
    .grouped_m = [](const GroupedGemmM& op) { multiply(launches_of(op)); },
    .grouped_k = [](const GroupedGemmK& op) { multiply(launches_of(op)); },
}};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
