#include "kernels/indexing.h"

#include "kernels/device/rows.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) lookup_kernel(const int* table, const int* index, int* y, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) y[i] = index[i] < 0 ? -1 : table[index[i]];
}

// A block has one row.
template <class X, class Y>
__global__ void __launch_bounds__(kMaxRowThreads)
    scatter_rows_kernel(const X* x, const int* index, Y* y, int n, bool aligned) {
  constexpr int kV = kVectorOf<X, Y>;
  const int64_t from = blockIdx.x, to = index[from];
  if (to < 0) return;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    store_floats(y + to * n, i, n, aligned, load_floats<kV>(x + from * n, i, n, aligned));
  }
}

void lookup_device(const Lookup& op) {
  const int64_t count = op.index.numel();
  launch<lookup_kernel>({.blocks = {static_cast<uint32_t>(ceil_div(count, kThreads))}, .threads = {kThreads}},
                        op.table.data<int32_t>(), op.index.data<int32_t>(), op.y.data<int32_t>(), count);
}

void scatter_rows_device(const ScatterRows& op) {
  const int n = static_cast<int>(op.x.dim(1));
  visit_device_floating("scatter_rows", op.x.dtype(), [&]<class X>() {
    visit_device_floating("scatter_rows", op.y.dtype(), [&]<class Y>() {
      const X* x = op.x.data<X>();
      Y* y = op.y.data<Y>();
      launch<scatter_rows_kernel<X, Y>>(
          {.blocks = {static_cast<uint32_t>(op.x.dim(0))}, .threads = {row_threads(n, kVectorOf<X, Y>)}}, x,
          op.index.data<int32_t>(), y, n, aligned_rows(n, x) && aligned_rows(n, y));
    });
  });
}

const RegisterKernel<Lookup> register_lookup{kDevice, &lookup_device};
const RegisterKernel<ScatterRows> register_scatter{kDevice, &scatter_rows_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
