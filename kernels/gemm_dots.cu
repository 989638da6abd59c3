#include "kernels/gemm_tiles.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 256;

// Whether some group that is not skipped owns the row: the last one that begins at or before it.
DEVICE_FN bool is_computed(const GemmLaunch& p, int row) {
  if (p.kind == GemmKind::kDense) return true;
  int low = 0, high = p.num_groups;  // groups before low begin at or before the row, those from high on behind it
  while (low < high) {
    const int middle = (low + high) / 2;
    if (p.offsets[middle] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low > 0 && row < p.offsets[low] && p.group_data[low - 1] != nullptr;
}

__global__ void __launch_bounds__(kThreads)
    gemm_dots_kernel(const __grid_constant__ GemmLaunch p, const float* parts, int tiles) {
  const int row = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (row >= p.m || !is_computed(p, row)) return;
  float sum = 0;
  for (int t = 0; t < tiles; ++t) sum += parts[static_cast<int64_t>(t) * p.m + row];
  const GemmLaunchEpilogue& e = p.epilogue;
  static_cast<float*>(e.dots)[e.scale_rows != nullptr ? e.scale_rows[row] : row] = sum;
}

}  // namespace

void add_dots(const GemmLaunch& p, const float* parts, int tiles) {
  launch<gemm_dots_kernel>({.blocks = {static_cast<uint32_t>(ceil_div(p.m, kThreads))}, .threads = {kThreads}}, p,
                           parts, tiles);
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
