#include "kernels/activation.h"

#include <cmath>

#include "kernels/device/rows.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 256;

struct Slope {
  float value, slope;
};

DEVICE_FN Slope gelu(float x) {
  const float phi = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
  return {x * phi, phi + x * 0.39894228040143268f * fast_exp(-0.5f * x * x)};
}
DEVICE_FN Slope at(Activation kind, float x) {
  switch (kind) {
    case Activation::kGelu:
      return gelu(x);
    case Activation::kTanh: {
      const float y = tanhf(x);
      return {y, 1.0f - y * y};
    }
    case Activation::kSigmoid: {
      const float y = sigmoid(x);
      return {y, y * (1.0f - y)};
    }
    case Activation::kOpen:
      return {x > 0.5f ? 1.0f : 0.0f, 0.0f};
    case Activation::kIsZero:
      return {x == 0.0f ? 1.0f : 0.0f, 0.0f};
    case Activation::kAbs:
      return {fabsf(x), x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f};
    case Activation::kSqrt: {
      const float y = sqrtf(x);
      return {y, x > 0.0f ? 0.5f / y : 0.0f};
    }
  }
  return {0.0f, 0.0f};
}

// y = f(x); with dy given f'(x) dy.
template <class T>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(const T* x, const T* dy, T* y, int64_t count, Activation kind, bool aligned) {
  constexpr int kV = kVector<T>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kV;
  if (i >= count) return;
  const auto in = load_floats<kV>(x, i, count, aligned);
  Floats<kV> d{}, out;
  if (dy != nullptr) d = load_floats<kV>(dy, i, count, aligned);
#pragma unroll
  for (int k = 0; k < kV; ++k) {
    const Slope f = at(kind, in[k]);
    out[k] = dy != nullptr ? f.slope * d[k] : f.value;
  }
  store_floats(y, i, count, aligned, out);
}

void run_device(Activation kind, const Tensor& x, const Tensor& dy, const Tensor& y) {
  visit_device_floating("activate", x.dtype(), [&]<class T>() {
    const T *in = x.data<T>(), *d = dy.defined() ? dy.data<T>() : nullptr;
    T* out = y.data<T>();
    launch<activate_kernel<T>>(
        {.blocks = {uint32_t(ceil_div(x.numel(), int64_t{kThreads} * kVector<T>))}, .threads = {kThreads}}, in, d, out,
        x.numel(), kind, aligned_rows(0, in, d, out));
  });
}

void forward_device(const Activate& op) { run_device(op.kind, op.x, Tensor(), op.y); }
void backward_device(const ActivateBackward& op) { run_device(op.kind, op.x, op.dy, op.dx); }

const RegisterKernel<Activate> register_forward{kDevice, &forward_device};
const RegisterKernel<ActivateBackward> register_backward{kDevice, &backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
