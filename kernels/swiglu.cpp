#include "kernels/swiglu.h"

#include "kernels/access.h"
#include "kernels/cpu_math.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kGrainElements = 16384;

int64_t row_grain(int64_t width) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width)); }

template <class T>
void forward(const SwiGlu& op) {
  using C = compute_t<T>;
  const int64_t rows = op.a.dim(0), width = op.a.dim(1);
  const T* h = op.h.data<T>();
  T* a = op.a.data<T>();
  parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const T *gate = h + p * 2 * width, *up = gate + width;
      T* out = a + p * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const C g = load(gate, i), sigmoid = C(1) / (C(1) + exp_of(-g));
        store(out, i, g * sigmoid * load(up, i));
      }
    }
  });
}

// kWithA: the activation is wanted again (it was not kept). Every input of an element is read before its outputs are written.
template <class T, bool kWithA>
void backward(const SwiGluBackward& op) {
  using C = compute_t<T>;
  const int64_t rows = op.da.dim(0), width = op.da.dim(1);
  const T *h = op.h.data<T>(), *da = op.da.data<T>();
  T* dh = op.dh.data<T>();
  T* a = kWithA ? op.a.data<T>() : nullptr;
  parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t gate = p * 2 * width, up = gate + width, out = p * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const C g = load(h, gate + i), u = load(h, up + i), d = load(da, out + i);
        const C sigmoid = C(1) / (C(1) + exp_of(-g)), silu = g * sigmoid;
        store(dh, gate + i, d * u * (sigmoid + silu * (C(1) - sigmoid)));
        store(dh, up + i, d * silu);
        if constexpr (kWithA) store(a, out + i, silu * u);
      }
    }
  });
}

void forward_cpu(const SwiGlu& op) {
  visit_floating("swiglu", op.h.dtype(), [&]<class T>() { forward<T>(op); });
}
void backward_cpu(const SwiGluBackward& op) {
  visit_floating("swiglu_backward", op.h.dtype(), [&]<class T>() {
    if (op.a.defined())
      backward<T, true>(op);
    else
      backward<T, false>(op);
  });
}
const RegisterKernel<SwiGlu> register_forward{DeviceKind::kCpu, &forward_cpu};
const RegisterKernel<SwiGluBackward> register_backward{DeviceKind::kCpu, &backward_cpu};

}  // namespace

void run(const SwiGlu& op) {
  require(op.h.rank() == 2 && op.h.dim(1) % 2 == 0, "swiglu: h is {}, expected [P, 2F]", op.h.shape());
  require_tensor(op.a, "swiglu", "a", {op.h.dim(0), op.h.dim(1) / 2}, op.h.dtype());
  dispatch(op, op.h.device(), "swiglu");
}

void run(const SwiGluBackward& op) {
  require(op.h.rank() == 2 && op.h.dim(1) % 2 == 0, "swiglu_backward: h is {}, expected [P, 2F]", op.h.shape());
  const Shape half{op.h.dim(0), op.h.dim(1) / 2};
  require_tensor(op.da, "swiglu_backward", "da", half, op.h.dtype());
  require_tensor(op.dh, "swiglu_backward", "dh", op.h.shape(), op.h.dtype());
  if (op.a.defined()) require_tensor(op.a, "swiglu_backward", "a", half, op.h.dtype());
  dispatch(op, op.h.device(), "swiglu_backward");
}

}  // namespace lightmoe
