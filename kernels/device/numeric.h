#pragma once
// Conversions between storage types and f32, in which kernels compute, and functions for which the hardware has a fast form.
// bf16 rounds to nearest, ties to even, as runtime/dtype.h. The fast functions have about 2 ulp of error on a GPU, none of it here.

#include "kernels/device/ptx.h"
#include "kernels/device/simt.h"

namespace lightmoe::LIGHTMOE_DEVICE {

DEVICE_FN float to_float(float value) { return value; }
DEVICE_FN float to_float(bf16 value) { return static_cast<float>(value); }

template <class T>
DEVICE_FN T from_float(float value) {
  if constexpr (std::is_same_v<T, bf16>) {
    return ptx::to_bf16(value);
  } else {
    return value;
  }
}

// Two bf16 in one register; the first lies at the lower address.
DEVICE_FN uint32_t pack_bf16(float first, float second) { return ptx::to_bf16x2(first, second); }
DEVICE_FN float first_bf16(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
DEVICE_FN float second_bf16(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }

#if defined(__CUDACC__)
DEVICE_FN float fast_exp(float x) { return __expf(x); }
DEVICE_FN float fast_log(float x) { return __logf(x); }
DEVICE_FN float fast_divide(float a, float b) { return __fdividef(a, b); }
DEVICE_FN float reciprocal_sqrt(float x) { return rsqrtf(x); }
#else
DEVICE_FN float fast_exp(float x) { return std::exp(x); }
DEVICE_FN float fast_log(float x) { return std::log(x); }
DEVICE_FN float fast_divide(float a, float b) { return a / b; }
DEVICE_FN float reciprocal_sqrt(float x) { return 1.0f / std::sqrt(x); }
#endif
DEVICE_FN float fast_exp2(float x) { return ptx::exp2_approximate(x); }
DEVICE_FN float sigmoid(float x) { return fast_divide(1.0f, 1.0f + fast_exp(-x)); }

// Calls f.template operator()<T>() for the types that device kernels take: f32 and bf16.
template <class F>
void visit_device_floating(std::string_view op, DType dtype, F&& f) {
  if (dtype == DType::kF32) return f.template operator()<float>();
  if (dtype == DType::kBF16) return f.template operator()<bf16>();
  unsupported_dtype(op, dtype);
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
