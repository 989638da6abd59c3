#include "kernels/softmax_top.h"

#include <cmath>

#include "kernels/device/numeric.h"
#include "kernels/device/reduce.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;  // a warp for each row

// The row of this warp, -1 behind the last. All lanes of a warp have the same one.
DEVICE_FN int64_t row_of_warp(int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  return row < rows ? row : -1;
}

// Is column j among the k largest? Ties go to the lower column.
template <class T>
DEVICE_FN bool is_among(const T* z, int n, int j, int k) {
  const float own = to_float(z[j]);
  int before = 0;
  for (int i = 0; i < n; ++i) {
    const float other = to_float(z[i]);
    before += other > own || (other == own && i < j) ? 1 : 0;
  }
  return before < k;
}

template <class T>
DEVICE_FN float row_dot(const T* a, const T* b, int n) {
  float sum = 0;
  for (int j = lane_id(); j < n; j += 32) sum += to_float(a[j]) * to_float(b[j]);
  return warp_sum(sum);
}
template <class T>
DEVICE_FN float row_sum(const T* x, int n) {
  float sum = 0;
  for (int j = lane_id(); j < n; j += 32) sum += to_float(x[j]);
  return warp_sum(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax_top_kernel(const T* all, T* out, int64_t rows, int n, int k, float scale) {
  const int64_t row = row_of_warp(rows);
  if (row < 0) return;
  const T* z = all + row * n;
  float largest = -INFINITY;
  for (int j = lane_id(); j < n; j += 32) largest = std::max(largest, to_float(z[j]));
  largest = warp_max(largest);
  float sum = 0;
  for (int j = lane_id(); j < n; j += 32) {
    if (k == n || is_among(z, n, j, k)) sum += fast_exp(scale * (to_float(z[j]) - largest));
  }
  sum = warp_sum(sum);
  for (int j = lane_id(); j < n; j += 32) {
    const bool taken = k == n || is_among(z, n, j, k);
    out[row * n + j] = from_float<T>(taken ? fast_exp(scale * (to_float(z[j]) - largest)) / sum : 0.0f);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax_top_backward_kernel(const T* p, const T* dp, T* dz, int64_t rows, int n, float scale) {
  const int64_t row = row_of_warp(rows);
  if (row < 0) return;
  const float mean = row_dot(p + row * n, dp + row * n, n);
  for (int64_t i = row * n + lane_id(); i < (row + 1) * n; i += 32)
    dz[i] = from_float<T>(scale * to_float(p[i]) * (to_float(dp[i]) - mean));
}

template <class T>
__global__ void __launch_bounds__(kThreads) keep_largest_kernel(const T* x, T* y, int64_t rows, int n, int k) {
  const int64_t row = row_of_warp(rows);
  if (row < 0) return;
  for (int j = lane_id(); j < n; j += 32) y[row * n + j] = from_float<T>(is_among(x + row * n, n, j, k) ? 1.0f : 0.0f);
}

template <class T>
__global__ void __launch_bounds__(kThreads) share_of_row_kernel(const T* x, T* y, int64_t rows, int n) {
  const int64_t row = row_of_warp(rows);
  if (row < 0) return;
  const float sum = row_sum(x + row * n, n);
  for (int64_t i = row * n + lane_id(); i < (row + 1) * n; i += 32)
    y[i] = from_float<T>(sum != 0 ? to_float(x[i]) / sum : 0.0f);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    share_of_row_backward_kernel(const T* x, const T* y, const T* dy, T* dx, int64_t rows, int n) {
  const int64_t row = row_of_warp(rows);
  if (row < 0) return;
  const float sum = row_sum(x + row * n, n), mean = row_dot(y + row * n, dy + row * n, n);
  for (int64_t i = row * n + lane_id(); i < (row + 1) * n; i += 32)
    dx[i] = from_float<T>(sum != 0 ? (to_float(dy[i]) - mean) / sum : 0.0f);
}

Launch grid_of(const Tensor& x) { return {.blocks = {uint32_t(ceil_div(x.dim(0), kWarps))}, .threads = {kThreads}}; }

void softmax_top_device(const SoftmaxTop& op) {
  visit_device_floating("softmax_top", op.z.dtype(), [&]<class T>() {
    launch<softmax_top_kernel<T>>(grid_of(op.z), op.z.data<T>(), op.p.data<T>(), op.z.dim(0),
                                  static_cast<int>(op.z.dim(1)), static_cast<int>(op.k), static_cast<float>(op.scale));
  });
}
void softmax_top_backward_device(const SoftmaxTopBackward& op) {
  visit_device_floating("softmax_top_backward", op.p.dtype(), [&]<class T>() {
    launch<softmax_top_backward_kernel<T>>(grid_of(op.p), op.p.data<T>(), op.dp.data<T>(), op.dz.data<T>(), op.p.dim(0),
                                           static_cast<int>(op.p.dim(1)), static_cast<float>(op.scale));
  });
}
void keep_largest_device(const KeepLargest& op) {
  visit_device_floating("keep_largest", op.x.dtype(), [&]<class T>() {
    launch<keep_largest_kernel<T>>(grid_of(op.x), op.x.data<T>(), op.y.data<T>(), op.x.dim(0),
                                   static_cast<int>(op.x.dim(1)), static_cast<int>(op.k));
  });
}
void share_of_row_device(const ShareOfRow& op) {
  visit_device_floating("share_of_row", op.x.dtype(), [&]<class T>() {
    launch<share_of_row_kernel<T>>(grid_of(op.x), op.x.data<T>(), op.y.data<T>(), op.x.dim(0),
                                   static_cast<int>(op.x.dim(1)));
  });
}
void share_of_row_backward_device(const ShareOfRowBackward& op) {
  visit_device_floating("share_of_row_backward", op.x.dtype(), [&]<class T>() {
    launch<share_of_row_backward_kernel<T>>(grid_of(op.x), op.x.data<T>(), op.y.data<T>(), op.dy.data<T>(),
                                            op.dx.data<T>(), op.x.dim(0), static_cast<int>(op.x.dim(1)));
  });
}

const RegisterKernel<SoftmaxTop> register_softmax{kDevice, &softmax_top_device};
const RegisterKernel<SoftmaxTopBackward> register_softmax_backward{kDevice, &softmax_top_backward_device};
const RegisterKernel<KeepLargest> register_keep{kDevice, &keep_largest_device};
const RegisterKernel<ShareOfRow> register_share{kDevice, &share_of_row_device};
const RegisterKernel<ShareOfRowBackward> register_share_backward{kDevice, &share_of_row_backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
