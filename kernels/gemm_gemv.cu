// gemm.h where few rows meet large matrices, as in decoding: every weight is read once, by one warp, in accesses of 16 bytes, and multiplied
// with up to kRows rows at a time, which come from the caches. A warp owns two columns of C (of SwiGLU: one of the gate and its partner),
// so that a row's elements serve twice. An element's sum has one order, whatever the other rows: lanes take pieces of 8 of k in turn, then
// the lanes are added up. Grouped: a block looks for its group among those that have rows.

#include "kernels/device/reduce.h"
#include "kernels/device/vector.h"
#include "kernels/gemm_tiles.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kRows = 8, kWarps = 4, kColumns = 2;
constexpr int64_t kMaxRows = 64;  // of a product that this backend takes

// The `index`-th group that has rows and a matrix; rows [first, end). All lanes must call.
struct RowsOfGroup {
  int first, end;
  const void* b;
};
DEVICE_FN RowsOfGroup find_rows(const GemmLaunch& p, int index) {
  if (p.kind == GemmKind::kDense) return {0, p.m, p.b.data};
  int before = 0;
  for (int first = 0; first < p.num_groups; first += 32) {
    const int group = first + lane_id();
    const bool asked =
        group < p.num_groups && p.group_data[group] != nullptr && p.offsets[group] < p.offsets[group + 1];
    const unsigned all = ballot(asked);
    if (index < before + std::popcount(all)) {
      const bool mine = asked && before + std::popcount(all & ((1u << lane_id()) - 1)) == index;
      const int owner = first + std::countr_zero(ballot(mine));
      return {p.offsets[owner], p.offsets[owner + 1], p.group_data[owner]};
    }
    before += std::popcount(all);
  }
  return {0, 0, nullptr};
}

template <class T>
DEVICE_FN Floats<8> factors(const T* row, int k, int end, bool round) {
  auto values = load_floats<8>(row, k, end, true);
  if (std::is_same_v<T, float> && round) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = to_float(from_float<bf16>(values[i]));
  }
  return values;
}

// sums[column][row] of `count` rows from `first` on.
template <class A, class B>
DEVICE_FN void multiply_rows(const GemmLaunch& p, const B* (&weights)[kColumns], int first, int count,
                             float (&sums)[kColumns][kRows]) {
  const A* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    rows[r] = static_cast<const A*>(p.a.data) + (r < count ? row_start(p.a, first + r) : 0);
  }
  for (int k = lane_id() * 8; k < p.k; k += 256) {
    Floats<8> w[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) w[c] = factors(weights[c], k, weights[c] != nullptr ? p.k : 0, p.round);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= count) continue;
      const auto x = factors(rows[r], k, p.k, p.round);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[c][r] += x[i] * w[c][i];
      }
    }
  }
}

template <class C>
DEVICE_FN void store_rows(const GemmLaunch& p, int first, int count, int column, const float (&sums)[kColumns][kRows]) {
  const TileOutput<C> out(p, p.c);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= count) continue;
    const float scale = out.scale(first + r);
    if (p.epilogue.swiglu()) {
      out.template swiglu<1>(first + r, column, scale, {sums[0][r]}, {sums[1][r]});
    } else {
      out.template update<2>(first + r, column, scale, {sums[0][r], sums[1][r]});
    }
  }
}

template <class A, class B>
__global__ void __launch_bounds__(32 * kWarps) gemm_gemv_kernel(const __grid_constant__ GemmLaunch p) {
  const RowsOfGroup rows = find_rows(p, static_cast<int>(blockIdx.y));
  const bool swiglu = p.epilogue.swiglu();
  const int warp = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  const int column = swiglu ? warp : warp * kColumns, width = swiglu ? p.n / 2 : p.n;
  if (rows.b == nullptr || column >= width) return;  // the whole warp
  const B* weights[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int row = swiglu ? column + c * width : column + c;
    weights[c] = row < p.n ? static_cast<const B*>(rows.b) + row * p.b.stride : nullptr;
  }
  for (int first = rows.first; first < rows.end; first += kRows) {
    const int count = std::min(int{kRows}, rows.end - first);
    float sums[kColumns][kRows] = {};
    multiply_rows<A, B>(p, weights, first, count, sums);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= count) continue;  // the whole warp
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[c][r] = warp_sum(sums[c][r]);
    }
    if (lane_id() != 0) continue;
    if (p.c_type == DType::kBF16) {
      store_rows<bf16>(p, first, count, column, sums);
    } else {
      store_rows<float>(p, first, count, column, sums);
    }
  }
}

void multiply(const std::vector<GemmLaunch>& launches) {
  for (const GemmLaunch& p : launches) {
    const int columns = p.epilogue.swiglu() ? p.n / 2 : ceil_div(p.n, kColumns);
    const int groups = p.kind == GemmKind::kDense ? 1 : std::min(p.num_groups, p.m);
    const Launch config{.blocks = {static_cast<uint32_t>(ceil_div(columns, kWarps)), static_cast<uint32_t>(groups)},
                        .threads = {32 * kWarps}};
    visit_device_floating("gemm", p.a_type, [&]<class A>() {
      visit_device_floating("gemm", p.b_type, [&]<class B>() { launch<gemm_gemv_kernel<A, B>>(config, p); });
    });
  }
}

bool supports(const GemmDesc& desc) {
  const bool forward = desc.kind != GemmKind::kGroupedK && !desc.trans_a && desc.trans_b;
  return desc.device == kDevice && forward && desc.c != DType::kF64 && desc.m <= kMaxRows && desc.k > 0 &&
         desc.alignment == 16 && desc.epilogue != GemmEpilogueKind::kSwiGluBackward;
}
// Each group's matrix once for every kRows of its rows, the first time from memory.
double cost(const GemmDesc& desc) {
  constexpr double kLaunch = 4, kBytesPerMicrosecond = 2.5e6;
  const double groups = static_cast<double>(std::max<int64_t>(1, std::min(desc.groups, desc.m)));
  const double passes = std::ceil(static_cast<double>(desc.m) / (groups * kRows));
  const double bytes = static_cast<double>(desc.n * desc.k) * static_cast<double>(size_of(desc.b));
  return kLaunch + groups * bytes * passes / kBytesPerMicrosecond;
}

const RegisterGemmBackend gemv{{
    .name = "gemv",
    .supports = &supports,
    .cost = &cost,
    .dense = [](const Gemm& op) { multiply(launches_of(op)); },
    .grouped_m = [](const GroupedGemmM& op) { multiply(launches_of(op)); },
    .grouped_k = nullptr,
}};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
