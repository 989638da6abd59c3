#include "kernels/elementwise.h"

#include "kernels/device/rows.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 256;

// y[i] = f(a[i], b[i]); b may be null, then it counts as 0.
template <class A, class B, class Y, class F>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(const A* a, const B* b, Y* y, int64_t count, F f, bool aligned) {
  constexpr int kV = kVectorOf<A, B, Y>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kV;
  if (i >= count) return;
  const auto first = load_floats<kV>(a, i, count, aligned);
  Floats<kV> second{};
  if (b != nullptr) second = load_floats<kV>(b, i, count, aligned);
  Floats<kV> out;
#pragma unroll
  for (int k = 0; k < kV; ++k) out[k] = f(first[k], second[k]);
  store_floats(y, i, count, aligned, out);
}

template <class A, class B, class Y, class F>
void map(const Tensor& a, const Tensor& b, const Tensor& y, F f) {
  const A* first = a.data<A>();
  const B* second = b.defined() ? b.data<B>() : nullptr;
  Y* out = y.data<Y>();
  const int64_t blocks = ceil_div(y.numel(), int64_t{kThreads} * kVectorOf<A, B, Y>);
  launch<elementwise_kernel<A, B, Y, F>>({.blocks = {uint32_t(blocks)}, .threads = {kThreads}}, first, second, out,
                                         y.numel(), f, aligned_rows(0, first, second, out));  // 0: a tail is no matter
}
template <class T, class F>
void map(const Tensor& x, const Tensor& y, F f) {
  map<T, T, T>(x, Tensor(), y, f);
}

struct Sum {
  DEVICE_FN float operator()(float a, float b) const { return a + b; }
};
struct AddScaled {  // of y and x
  float alpha;
  DEVICE_FN float operator()(float y, float x) const { return y + alpha * x; }
};
struct Scaled {
  float alpha;
  DEVICE_FN float operator()(float x, float) const { return alpha * x; }
};
struct Clamped {  // NaN passes
  float limit;
  DEVICE_FN float operator()(float x, float) const { return x < -limit ? -limit : x > limit ? limit : x; }
};
struct InLimits {  // dy where x is within
  float limit;
  DEVICE_FN float operator()(float x, float dy) const { return x >= -limit && x <= limit ? dy : 0.0f; }
};
struct Same {
  DEVICE_FN float operator()(float x, float) const { return x; }
};
struct Mixed {
  float beta;
  DEVICE_FN float operator()(float a, float b) const { return b + beta * (a - b); }
};

struct SiluOf {
  DEVICE_FN float operator()(float x, float) const { return x * sigmoid(x); }
};
struct SiluGradient {  // of x and dy
  DEVICE_FN float operator()(float x, float dy) const {
    const float s = sigmoid(x), silu = x * s;
    return dy * (s + silu * (1.0f - s));
  }
};

void add_device(const Add& op) {
  visit_device_floating("add", op.y.dtype(), [&]<class T>() { map<T, T, T>(op.a, op.b, op.y, Sum{}); });
}
void axpy_device(const Axpy& op) {
  visit_device_floating("axpy", op.y.dtype(), [&]<class Y>() {
    visit_device_floating("axpy", op.x.dtype(),
                          [&]<class X>() { map<Y, X, Y>(op.y, op.x, op.y, AddScaled{static_cast<float>(op.alpha)}); });
  });
}
void scale_device(const Scale& op) {
  visit_device_floating("scale", op.y.dtype(),
                        [&]<class T>() { map<T>(op.x, op.y, Scaled{static_cast<float>(op.alpha)}); });
}
void clamp_device(const Clamp& op) {
  visit_device_floating("clamp", op.y.dtype(),
                        [&]<class T>() { map<T>(op.x, op.y, Clamped{static_cast<float>(op.limit)}); });
}
void clamp_backward_device(const ClampBackward& op) {
  visit_device_floating("clamp_backward", op.dx.dtype(),
                        [&]<class T>() { map<T, T, T>(op.x, op.dy, op.dx, InLimits{static_cast<float>(op.limit)}); });
}

void silu_device(const Silu& op) {
  visit_device_floating("silu", op.y.dtype(), [&]<class T>() { map<T>(op.x, op.y, SiluOf{}); });
}
void silu_backward_device(const SiluBackward& op) {
  visit_device_floating("silu_backward", op.dx.dtype(),
                        [&]<class T>() { map<T, T, T>(op.x, op.dy, op.dx, SiluGradient{}); });
}

template <class A, class B, class Y>
void blend(const Blend& op) {
  const auto beta = static_cast<float>(op.beta);
  if (beta == 1.0f) return map<A, A, Y>(op.a, Tensor(), op.y, Same{});
  if (beta == 0.0f) return map<B, B, Y>(op.b, Tensor(), op.y, Same{});
  map<A, B, Y>(op.a, op.b, op.y, Mixed{beta});
}
void blend_device(const Blend& op) {
  visit_device_floating("blend", op.y.dtype(), [&]<class Y>() {
    visit_device_floating("blend", op.a.dtype(), [&]<class A>() {
      visit_device_floating("blend", op.b.dtype(), [&]<class B>() { blend<A, B, Y>(op); });
    });
  });
}

// Tensor::copy_from between f32 and bf16.
template <class From, class To>
void convert_to(const void* from, void* to, size_t count) {
  const auto n = static_cast<int64_t>(count);
  const From* source = static_cast<const From*>(from);
  To* target = static_cast<To*>(to);
  const int64_t blocks = ceil_div(n, int64_t{kThreads} * kVectorOf<From, From, To>);
  launch<elementwise_kernel<From, From, To, Same>>({.blocks = {uint32_t(blocks)}, .threads = {kThreads}}, source,
                                                   static_cast<const From*>(nullptr), target, n, Same{},
                                                   aligned_rows(0, source, target));
}
bool convert_device(const void* from, DType from_type, void* to, DType to_type, size_t count) {
  if (from_type == DType::kF32 && to_type == DType::kBF16) return convert_to<float, bf16>(from, to, count), true;
  if (from_type == DType::kBF16 && to_type == DType::kF32) return convert_to<bf16, float>(from, to, count), true;
  return false;
}
const RegisterDeviceConvert register_convert{kDevice, &convert_device};

const RegisterKernel<Add> register_add{kDevice, &add_device};
const RegisterKernel<Axpy> register_axpy{kDevice, &axpy_device};
const RegisterKernel<Scale> register_scale{kDevice, &scale_device};
const RegisterKernel<Clamp> register_clamp{kDevice, &clamp_device};
const RegisterKernel<ClampBackward> register_clamp_backward{kDevice, &clamp_backward_device};
const RegisterKernel<Blend> register_blend{kDevice, &blend_device};
const RegisterKernel<Silu> register_silu{kDevice, &silu_device};
const RegisterKernel<SiluBackward> register_silu_backward{kDevice, &silu_backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
