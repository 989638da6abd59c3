#pragma once
// Element types and the scalar conversions between them.
// bf16 and f16 round to nearest, ties to even; NaN stays NaN (quieted), infinities and signs
// survive. NOTE: adding 0x7fff and truncating turns some NaN payloads into infinity or zero; hence
// the test.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace lightmoe {

enum class DType : uint8_t { kF32, kBF16, kF16, kF64, kI32, kI64, kU8 };

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kU8:
      return 1;
  }
  return 0;
}
constexpr bool is_floating(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16 || dtype == DType::kF64;
}
std::string_view name_of(DType dtype);  // "f32", "bf16", ...

struct bf16 {
  uint16_t bits;
  bf16() = default;
  constexpr explicit bf16(float value) : bits(0) {  // constexpr: also for device code
    const uint32_t u = std::bit_cast<uint32_t>(value);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
      bits = static_cast<uint16_t>((u >> 16) | 0x0040u);  // NaN: keep sign and payload, set quiet
    } else {
      bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
  }
  constexpr explicit operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

struct f16 {
  uint16_t bits;
  f16() = default;
  explicit f16(float value);
  explicit operator float() const;
};

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::kBF16;
};
template <>
struct DTypeOf<f16> {
  static constexpr DType value = DType::kF16;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kF64;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::kI32;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::kI64;
};
template <>
struct DTypeOf<uint8_t> {
  static constexpr DType value = DType::kU8;
};
template <class T>
inline constexpr DType dtype_of = DTypeOf<T>::value;

// Type in which an op computes and accumulates: double for double, float for everything smaller.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using compute_t = typename ComputeOf<T>::type;

// Calls f.template operator()<T>() with the C++ type of a floating dtype an op supports
// (f32, bf16, f64). Throws for the others.
[[noreturn]] void unsupported_dtype(std::string_view op, DType dtype);
template <class F>
decltype(auto) visit_floating(std::string_view op, DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<float>();
    case DType::kBF16:
      return f.template operator()<bf16>();
    case DType::kF64:
      return f.template operator()<double>();
    default:
      unsupported_dtype(op, dtype);
  }
}

// Converts count elements between any two floating types (f64 goes through double), memory may be
// unaligned (files are). Source and destination must not overlap unless they are the same address
// and type.
void convert(const void* from, DType from_type, void* to, DType to_type, size_t count);

}  // namespace lightmoe
