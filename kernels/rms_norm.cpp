#include "kernels/rms_norm.h"

#include <cmath>
#include <vector>

#include "kernels/access.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kRowGrain = 16;  // rows a thread takes at least

template <class T, class W>
void forward(const RmsNorm& op) {
  using C = compute_t<T>;
  const int64_t rows = op.x.dim(0), n = op.x.dim(1);
  const T* x = op.x.data<T>();
  const W* w = op.w.data<W>();
  T* y = op.y.data<T>();
  C* rstd = op.rstd.defined() ? op.rstd.data<C>() : nullptr;
  const T *first = x, *residual = op.residual.defined() ? op.residual.data<T>() : nullptr;
  T* stored = residual != nullptr ? op.sum.data<T>() : nullptr;
  if (residual != nullptr) x = stored;
  parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = t * n; residual != nullptr && i < (t + 1) * n; ++i) {
        store(stored, i, load(first, i) + load(residual, i));
      }
      C sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += load(x, t * n + i) * load(x, t * n + i);
      const C r = C(1) / std::sqrt(sum / static_cast<C>(n) + static_cast<C>(op.eps));
      for (int64_t i = 0; i < n; ++i) {
        const T normalized = static_cast<T>(load(x, t * n + i) * r);  // rounded to x's type first, as HF
        store(y, t * n + i, static_cast<C>(normalized) * static_cast<C>(load(w, i)));
      }
      if (rstd != nullptr) rstd[t] = r;
    }
  });
}

template <class T, class W>
void backward(const RmsNormBackward& op) {
  using C = compute_t<T>;
  const int64_t rows = op.x.dim(0), n = op.x.dim(1);
  const T* x = op.x.data<T>();
  const W* w = op.w.data<W>();
  const T* dy = op.dy.data<T>();
  const C* rstd = op.rstd.data<C>();
  // dw first: dx may overwrite dy. Threads own columns, so the sum over t has one order.
  if (op.dw.defined()) {
    C* dw = op.dw.data<C>();
    parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t i = begin; i < end; ++i) dw[i] += load(dy, t * n + i) * load(x, t * n + i) * rstd[t];
      }
    });
  }
  T* dx = op.dx.data<T>();
  const T* dsum = op.dsum.defined() ? op.dsum.data<T>() : nullptr;
  parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      C dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < n; ++i) {
        dot += load(dy, t * n + i) * static_cast<C>(load(w, i)) * load(x, t * n + i);
      }
      const C r = rstd[t], correction = dot / static_cast<C>(n) * r * r;
      for (int64_t i = 0; i < n; ++i) {
        const C g = load(dy, t * n + i) * static_cast<C>(load(w, i));
        const C own = r * (g - load(x, t * n + i) * correction);
        store(dx, t * n + i, dsum != nullptr ? load(dsum, t * n + i) + own : own);
      }
    }
  });
}

void forward_cpu(const RmsNorm& op) {
  visit_floating("rms_norm", op.x.dtype(),
                 [&]<class T>() { visit_weight<T>("rms_norm", op.w.dtype(), [&]<class W>() { forward<T, W>(op); }); });
}
void backward_cpu(const RmsNormBackward& op) {
  visit_floating("rms_norm_backward", op.x.dtype(), [&]<class T>() {
    visit_weight<T>("rms_norm_backward", op.w.dtype(), [&]<class W>() { backward<T, W>(op); });
  });
}
const RegisterKernel<RmsNorm> register_forward{DeviceKind::kCpu, &forward_cpu};
const RegisterKernel<RmsNormBackward> register_backward{DeviceKind::kCpu, &backward_cpu};

}  // namespace

void run(const RmsNorm& op) {
  require(op.x.rank() == 2, "rms_norm: x is {}, expected [T, N]", op.x.shape());
  require_tensor(op.w, "rms_norm", "w", {op.x.dim(1)}, op.w.dtype());
  require_tensor(op.y, "rms_norm", "y", op.x.shape(), op.x.dtype());
  if (op.rstd.defined()) require_tensor(op.rstd, "rms_norm", "rstd", {op.x.dim(0)}, accumulator_of(op.x.dtype()));
  require(op.residual.defined() == op.sum.defined(), "rms_norm: residual and sum go together, one of them is missing");
  if (op.residual.defined()) {
    require_tensor(op.residual, "rms_norm", "residual", op.x.shape(), op.x.dtype());
    require_tensor(op.sum, "rms_norm", "sum", op.x.shape(), op.x.dtype());
  }
  dispatch(op, op.x.device(), "rms_norm");
}

void run(const RmsNormBackward& op) {
  require(op.x.rank() == 2, "rms_norm_backward: x is {}, expected [T, N]", op.x.shape());
  const DType accumulator = accumulator_of(op.x.dtype());
  require_tensor(op.w, "rms_norm_backward", "w", {op.x.dim(1)}, op.w.dtype());
  require_tensor(op.rstd, "rms_norm_backward", "rstd", {op.x.dim(0)}, accumulator);
  require_tensor(op.dy, "rms_norm_backward", "dy", op.x.shape(), op.x.dtype());
  require_tensor(op.dx, "rms_norm_backward", "dx", op.x.shape(), op.x.dtype());
  if (op.dw.defined()) require_tensor(op.dw, "rms_norm_backward", "dw", {op.x.dim(1)}, accumulator);
  if (op.dsum.defined()) require_tensor(op.dsum, "rms_norm_backward", "dsum", op.x.shape(), op.x.dtype());
  dispatch(op, op.x.device(), "rms_norm_backward");
}

}  // namespace lightmoe
