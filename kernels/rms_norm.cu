#include "kernels/rms_norm.h"

#include "kernels/access.h"
#include "kernels/device/reduce.h"
#include "kernels/device/vector.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kRowThreads = 256;  // of a block that works on one row
constexpr int kChunkRows = 256;   // rows whose part of dw one block adds up
constexpr int kColumnWarps = 8;   // in that block

int row_threads(int64_t width, int vector) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(width, vector * 32) * 32, 32, kRowThreads));
}

template <class T, class W>
__global__ void __launch_bounds__(kRowThreads)
    rms_norm_kernel(const T* x, const W* w, T* y, float* rstd, int n, float eps, bool aligned) {
  constexpr int kV = kVector<T>;
  auto& scratch = shared_memory<BlockScratch<>>();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n;
  const int first = static_cast<int>(threadIdx.x) * kV, step = static_cast<int>(blockDim.x) * kV;
  float sum = 0;
  for (int i = first; i < n; i += step) {
    const auto v = load_floats<kV>(x + row, i, n, aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k) sum += v[k] * v[k];
  }
  sum = block_sum(sum, scratch);
  const float r = reciprocal_sqrt(sum / static_cast<float>(n) + eps);
  for (int i = first; i < n; i += step) {
    auto v = load_floats<kV>(x + row, i, n, aligned);
    const auto weight = load_floats<kV>(w, i, n, aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k)
      v[k] = to_float(from_float<T>(v[k] * r)) * weight[k];  // rounded to x's type first, as HF
    store_floats(y + row, i, n, aligned, v);
  }
  if (rstd != nullptr && threadIdx.x == 0) rstd[blockIdx.x] = r;
}

template <class T, class W>
__global__ void __launch_bounds__(kRowThreads)
    rms_norm_dx_kernel(const T* x, const W* w, const float* rstd, const T* dy, T* dx, int n, bool aligned) {
  constexpr int kV = kVector<T>;
  auto& scratch = shared_memory<BlockScratch<>>();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n;
  const int first = static_cast<int>(threadIdx.x) * kV, step = static_cast<int>(blockDim.x) * kV;
  float dot = 0;
  for (int i = first; i < n; i += step) {
    const auto v = load_floats<kV>(x + row, i, n, aligned), g = load_floats<kV>(dy + row, i, n, aligned);
    const auto weight = load_floats<kV>(w, i, n, aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k) dot += g[k] * weight[k] * v[k];
  }
  dot = block_sum(dot, scratch);
  const float r = rstd[blockIdx.x], correction = dot / static_cast<float>(n) * r * r;
  for (int i = first; i < n; i += step) {
    const auto v = load_floats<kV>(x + row, i, n, aligned), weight = load_floats<kV>(w, i, n, aligned);
    auto g = load_floats<kV>(dy + row, i, n, aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k) g[k] = r * (g[k] * weight[k] - v[k] * correction);
    store_floats(dx + row, i, n, aligned, g);
  }
}

template <class T>
struct ColumnSums {
  float warp[kColumnWarps][32 * kVector<T>];
};

// partial[chunk, i] = sum of dy x rstd over the chunk's rows. A lane owns kVector columns, a warp every eighth row.
template <class T>
__global__ void __launch_bounds__(32 * kColumnWarps)
    rms_norm_dw_kernel(const T* x, const float* rstd, const T* dy, float* partial, int rows, int n, bool aligned) {
  constexpr int kV = kVector<T>, kColumns = 32 * kV;
  auto& shared = shared_memory<ColumnSums<T>>();
  const int column = static_cast<int>(blockIdx.x) * kColumns, mine = column + lane_id() * kV;
  const int begin = static_cast<int>(blockIdx.y) * kChunkRows, end = std::min(begin + kChunkRows, rows);
  Floats<kV> sum{};
  for (int t = begin + warp_id(); t < end; t += kColumnWarps) {
    const int64_t row = static_cast<int64_t>(t) * n;
    const auto v = load_floats<kV>(x + row, mine, n, aligned), g = load_floats<kV>(dy + row, mine, n, aligned);
    const float r = rstd[t];
#pragma unroll
    for (int k = 0; k < kV; ++k) sum[k] += g[k] * v[k] * r;
  }
#pragma unroll
  for (int k = 0; k < kV; ++k) shared.warp[warp_id()][lane_id() * kV + k] = sum[k];
  sync_block();
  for (int i = static_cast<int>(threadIdx.x); i < kColumns && column + i < n; i += static_cast<int>(blockDim.x)) {
    float total = 0;
    for (int w = 0; w < kColumnWarps; ++w) total += shared.warp[w][i];
    partial[static_cast<int64_t>(blockIdx.y) * n + column + i] = total;
  }
}

__global__ void __launch_bounds__(256) add_chunks_kernel(const float* partial, float* dw, int chunks, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  float sum = 0;
  for (int c = 0; c < chunks; ++c) sum += partial[static_cast<int64_t>(c) * n + i];
  dw[i] += sum;
}

template <class T, class W>
void forward(const RmsNorm& op) {
  const auto rows = static_cast<uint32_t>(op.x.dim(0));
  const int n = static_cast<int>(op.x.dim(1));
  const T* x = op.x.data<T>();
  const W* w = op.w.data<W>();
  T* y = op.y.data<T>();
  float* rstd = op.rstd.defined() ? op.rstd.data<float>() : nullptr;
  launch<rms_norm_kernel<T, W>>(
      {.blocks = {rows}, .threads = {uint32_t(row_threads(n, kVector<T>))}, .shared_bytes = sizeof(BlockScratch<>)}, x,
      w, y, rstd, n, static_cast<float>(op.eps), aligned_rows(n, x, y) && aligned_rows(n, w));
}

template <class T>
void backward_w(const RmsNormBackward& op) {
  const int rows = static_cast<int>(op.x.dim(0)), n = static_cast<int>(op.x.dim(1));
  const int chunks = std::max(ceil_div(rows, kChunkRows), 1);
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor partial = Tensor::empty({chunks, n}, DType::kF32, kDevice);
  const T *x = op.x.data<T>(), *dy = op.dy.data<T>();
  launch<rms_norm_dw_kernel<T>>({.blocks = {uint32_t(ceil_div(n, 32 * kVector<T>)), uint32_t(chunks)},
                                 .threads = {32 * kColumnWarps},
                                 .shared_bytes = sizeof(ColumnSums<T>)},
                                x, op.rstd.data<float>(), dy, partial.data<float>(), rows, n, aligned_rows(n, x, dy));
  launch<add_chunks_kernel>({.blocks = {uint32_t(ceil_div(n, 256))}, .threads = {256}}, partial.data<float>(),
                            op.dw.data<float>(), chunks, n);
}

template <class T, class W>
void backward(const RmsNormBackward& op) {
  if (op.dw.defined()) backward_w<T>(op);  // first: dx may overwrite dy
  const int n = static_cast<int>(op.x.dim(1));
  const T *x = op.x.data<T>(), *dy = op.dy.data<T>();
  const W* w = op.w.data<W>();
  T* dx = op.dx.data<T>();
  launch<rms_norm_dx_kernel<T, W>>({.blocks = {uint32_t(op.x.dim(0))},
                                    .threads = {uint32_t(row_threads(n, kVector<T>))},
                                    .shared_bytes = sizeof(BlockScratch<>)},
                                   x, w, op.rstd.data<float>(), dy, dx, n,
                                   aligned_rows(n, x, dy, dx) && aligned_rows(n, w));
}

void forward_device(const RmsNorm& op) {
  visit_device_floating("rms_norm", op.x.dtype(), [&]<class T>() {
    visit_weight<T>("rms_norm", op.w.dtype(), [&]<class W>() { forward<T, W>(op); });
  });
}
void backward_device(const RmsNormBackward& op) {
  visit_device_floating("rms_norm_backward", op.x.dtype(), [&]<class T>() {
    visit_weight<T>("rms_norm_backward", op.w.dtype(), [&]<class W>() { backward<T, W>(op); });
  });
}
const RegisterKernel<RmsNorm> register_forward{kDevice, &forward_device};
const RegisterKernel<RmsNormBackward> register_backward{kDevice, &backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
