#include "kernels/rms_norm.h"

#include "kernels/access.h"
#include "kernels/device/add_chunks.h"
#include "kernels/device/reduce.h"
#include "kernels/device/rows.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int round_up_4(int n) { return (n + 3) / 4 * 4; }

constexpr int kChunkRows = 16;  // whose part of dw one block adds up

// A row in shared memory as f32, behind the scratch of its sums: every thread keeps the columns it owns.
DEVICE_FN float* kept_rows(BlockScratch<>& scratch) { return reinterpret_cast<float*>(&scratch + 1); }
size_t shared_for(int rows, int width) {
  return sizeof(BlockScratch<>) + static_cast<size_t>(rows * round_up_4(width)) * sizeof(float);
}

template <class T>
struct NormRows {
  const T *x, *residual;
  T *sum, *y;
};

template <class T, class W, bool kResidual>
__global__ void __launch_bounds__(kMaxRowThreads)
    rms_norm_kernel(NormRows<T> rows, const W* w, float* rstd, int n, float eps, bool aligned) {
  constexpr int kV = kVector<T>;
  auto& scratch = shared_memory<BlockScratch<>>();
  float* kept = kept_rows(scratch);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n;
  float squares = 0;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    auto v = load_floats<kV>(rows.x + row, i, n, aligned);
    if constexpr (kResidual) {
      const auto other = load_floats<kV>(rows.residual + row, i, n, aligned);
#pragma unroll
      for (int k = 0; k < kV; ++k) v[k] = to_float(from_float<T>(v[k] + other[k]));
      store_floats(rows.sum + row, i, n, aligned, v);
    }
#pragma unroll
    for (int k = 0; k < kV; ++k) squares += v[k] * v[k];
    store_floats(kept, i, n, true, v);
  }
  squares = block_sum(squares, scratch);
  const float r = reciprocal_sqrt(squares / static_cast<float>(n) + eps);
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    auto v = load_floats<kV>(kept, i, n, true);
    const auto weight = load_floats<kV>(w, i, n, aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k)
      v[k] = to_float(from_float<T>(v[k] * r)) * weight[k];  // rounded to x's type first, as HF
    store_floats(rows.y + row, i, n, aligned, v);
  }
  if (rstd != nullptr && threadIdx.x == 0) rstd[blockIdx.x] = r;
}

template <class T>
struct NormGradients {
  const T *x, *dy, *dsum;
  T* dx;
};

// Rows of a chunk one after the other. partial[chunk, column] = sum of dy x rstd over them, unless null.
template <class T, class W>
__global__ void __launch_bounds__(kMaxRowThreads)
    rms_norm_backward_kernel(NormGradients<T> rows, const W* w, const float* rstd, float* partial, int num_rows,
                             int chunk_rows, int n, bool aligned) {
  constexpr int kV = kVector<T>;
  auto& scratch = shared_memory<BlockScratch<>>();
  const int padded = round_up_4(n);
  float *kept_x = kept_rows(scratch), *kept_g = kept_x + padded, *dw = kept_g + padded;
  const int begin = static_cast<int>(blockIdx.x) * chunk_rows, end = std::min(begin + chunk_rows, num_rows);
  for (int t = begin; t < end; ++t) {
    const int64_t row = static_cast<int64_t>(t) * n;
    const float r = rstd[t];
    float dot = 0;
    for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
      const auto v = load_floats<kV>(rows.x + row, i, n, aligned), weight = load_floats<kV>(w, i, n, aligned);
      auto g = load_floats<kV>(rows.dy + row, i, n, aligned);
      if (partial != nullptr) {
        auto sum = t == begin ? Floats<kV>{} : load_floats<kV>(dw, i, n, true);
#pragma unroll
        for (int k = 0; k < kV; ++k) sum[k] += g[k] * v[k] * r;
        store_floats(dw, i, n, true, sum);
      }
#pragma unroll
      for (int k = 0; k < kV; ++k) g[k] *= weight[k], dot += g[k] * v[k];
      store_floats(kept_x, i, n, true, v);
      store_floats(kept_g, i, n, true, g);
    }
    dot = block_sum(dot, scratch);
    const float correction = dot / static_cast<float>(n) * r * r;
    for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
      const auto v = load_floats<kV>(kept_x, i, n, true);
      auto g = load_floats<kV>(kept_g, i, n, true);
#pragma unroll
      for (int k = 0; k < kV; ++k) g[k] = r * (g[k] - v[k] * correction);
      if (rows.dsum != nullptr) {
        const auto other = load_floats<kV>(rows.dsum + row, i, n, aligned);
#pragma unroll
        for (int k = 0; k < kV; ++k) g[k] += other[k];
      }
      store_floats(rows.dx + row, i, n, aligned, g);
    }
  }
  if (partial == nullptr) return;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    store_floats(partial + static_cast<int64_t>(blockIdx.x) * padded, i, n, true, load_floats<kV>(dw, i, n, true));
  }
}

template <class T, class W>
void forward(const RmsNorm& op) {
  const auto num_rows = static_cast<uint32_t>(op.x.dim(0));
  const int n = static_cast<int>(op.x.dim(1));
  NormRows<T> rows{op.x.data<T>(), nullptr, nullptr, op.y.data<T>()};
  const W* w = op.w.data<W>();
  float* rstd = op.rstd.defined() ? op.rstd.data<float>() : nullptr;
  const Launch config{.blocks = {num_rows}, .threads = {row_threads(n, kVector<T>)}, .shared_bytes = shared_for(1, n)};
  const bool aligned = aligned_rows(n, rows.x, rows.y) && aligned_rows(n, w);
  const float eps = static_cast<float>(op.eps);
  if (!op.residual.defined()) return launch<rms_norm_kernel<T, W, false>>(config, rows, w, rstd, n, eps, aligned);
  rows.residual = op.residual.data<T>(), rows.sum = op.sum.data<T>();
  launch<rms_norm_kernel<T, W, true>>(config, rows, w, rstd, n, eps,
                                      aligned && aligned_rows(n, rows.residual, rows.sum));
}

template <class T, class W>
void backward(const RmsNormBackward& op) {
  const int num_rows = static_cast<int>(op.x.dim(0)), n = static_cast<int>(op.x.dim(1));
  if (num_rows == 0) return;
  const bool with_w = op.dw.defined();
  const int chunk_rows = with_w ? kChunkRows : 1, chunks = ceil_div(num_rows, chunk_rows);
  const NormGradients<T> rows{op.x.data<T>(), op.dy.data<T>(), op.dsum.defined() ? op.dsum.data<T>() : nullptr,
                              op.dx.data<T>()};
  const W* w = op.w.data<W>();
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor partial = with_w ? Tensor::empty({chunks, round_up_4(n)}, DType::kF32, kDevice) : Tensor();
  launch<rms_norm_backward_kernel<T, W>>({.blocks = {uint32_t(chunks)},
                                          .threads = {row_threads(n, kVector<T>)},
                                          .shared_bytes = shared_for(with_w ? 3 : 2, n)},
                                         rows, w, op.rstd.data<float>(), with_w ? partial.data<float>() : nullptr,
                                         num_rows, chunk_rows, n,
                                         aligned_rows(n, rows.x, rows.dy, rows.dsum, rows.dx) && aligned_rows(n, w));
  if (with_w) add_chunks(partial.data<float>(), op.dw.data<float>(), chunks, n, round_up_4(n));
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
