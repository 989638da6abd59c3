#include "kernels/swiglu.h"

#include "kernels/device/rows.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

DEVICE_FN float silu_of(float gate, float sigmoid_of_gate) { return gate * sigmoid_of_gate; }

template <class T>
__global__ void __launch_bounds__(kMaxRowThreads) swiglu_kernel(const T* h, T* a, int n, bool aligned) {
  constexpr int kV = kVector<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n;
  const T *gate = h + 2 * row, *up = gate + n;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    const auto g = load_floats<kV>(gate, i, n, aligned), u = load_floats<kV>(up, i, n, aligned);
    Floats<kV> out;
#pragma unroll
    for (int k = 0; k < kV; ++k) out[k] = silu_of(g[k], sigmoid(g[k])) * u[k];
    store_floats(a + row, i, n, aligned, out);
  }
}

// a may be null. An element's inputs are read before its outputs are written, so that dh may be h and a may be da.
template <class T>
__global__ void __launch_bounds__(kMaxRowThreads)
    swiglu_backward_kernel(const T* h, const T* da, T* dh, T* a, int n, bool aligned) {
  constexpr int kV = kVector<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n;
  const T *gate = h + 2 * row, *up = gate + n;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    const auto g = load_floats<kV>(gate, i, n, aligned), u = load_floats<kV>(up, i, n, aligned);
    const auto d = load_floats<kV>(da + row, i, n, aligned);
    Floats<kV> dgate, dup, out;
#pragma unroll
    for (int k = 0; k < kV; ++k) {
      const float s = sigmoid(g[k]), silu = silu_of(g[k], s);
      dgate[k] = d[k] * u[k] * (s + silu * (1.0f - s));
      dup[k] = d[k] * silu;
      out[k] = silu * u[k];
    }
    store_floats(dh + 2 * row, i, n, aligned, dgate);
    store_floats(dh + 2 * row + n, i, n, aligned, dup);
    if (a != nullptr) store_floats(a + row, i, n, aligned, out);
  }
}

void forward_device(const SwiGlu& op) {
  visit_device_floating("swiglu", op.h.dtype(), [&]<class T>() {
    const int n = static_cast<int>(op.a.dim(1));
    const T* h = op.h.data<T>();
    T* a = op.a.data<T>();
    launch<swiglu_kernel<T>>({.blocks = {uint32_t(op.a.dim(0))}, .threads = {row_threads(n, kVector<T>)}}, h, a, n,
                             aligned_rows(n, h, a));
  });
}
void backward_device(const SwiGluBackward& op) {
  visit_device_floating("swiglu_backward", op.h.dtype(), [&]<class T>() {
    const int n = static_cast<int>(op.da.dim(1));
    const T *h = op.h.data<T>(), *da = op.da.data<T>();
    T *dh = op.dh.data<T>(), *a = op.a.defined() ? op.a.data<T>() : nullptr;
    launch<swiglu_backward_kernel<T>>({.blocks = {uint32_t(op.da.dim(0))}, .threads = {row_threads(n, kVector<T>)}}, h,
                                      da, dh, a, n, aligned_rows(n, h, da, dh, a));
  });
}
const RegisterKernel<SwiGlu> register_forward{kDevice, &forward_device};
const RegisterKernel<SwiGluBackward> register_backward{kDevice, &backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
