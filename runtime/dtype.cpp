#include "runtime/dtype.h"

#include <cmath>
#include <cstring>

#include "runtime/error.h"
#include "runtime/parallel.h"

namespace lightmoe {

std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kF64:
      return "f64";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
    case DType::kU8:
      return "u8";
  }
  return "?";
}

f16::f16(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {  // NaN
    bits = static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu));
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // subnormal half: units of 2^-24, the FPU rounds to even
    const float scaled = std::bit_cast<float>(magnitude) * 16777216.0f;
    bits = static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(scaled)));
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
}

f16::operator float() const {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

void unsupported_dtype(std::string_view op, DType dtype) {
  fail(ErrorKind::kInternal, "{}: dtype {} is not supported (f32, bf16, f64 are)", op, name_of(dtype));
}

namespace {

template <class From, class To>
void convert_range(const char* from, char* to, size_t count) {
  using C = std::conditional_t<std::is_same_v<From, double> && std::is_same_v<To, double>, double,
                               std::conditional_t<std::is_same_v<To, double>, double, float>>;
  for (size_t i = 0; i < count; ++i) {
    From f;
    std::memcpy(&f, from + i * sizeof(From), sizeof(From));
    C c;
    if constexpr (std::is_same_v<From, double>)
      c = static_cast<C>(f);
    else
      c = static_cast<C>(static_cast<float>(f));
    const To t = static_cast<To>(c);
    std::memcpy(to + i * sizeof(To), &t, sizeof(To));
  }
}

template <class From>
void convert_from(const char* from, void* to, DType to_type, size_t begin, size_t count) {
  char* out = static_cast<char*>(to) + begin * size_of(to_type);
  const char* in = from + begin * sizeof(From);
  switch (to_type) {
    case DType::kF32:
      return convert_range<From, float>(in, out, count);
    case DType::kBF16:
      return convert_range<From, bf16>(in, out, count);
    case DType::kF16:
      return convert_range<From, f16>(in, out, count);
    case DType::kF64:
      return convert_range<From, double>(in, out, count);
    default:
      unsupported_dtype("convert", to_type);
  }
}

}  // namespace

void convert(const void* from, DType from_type, void* to, DType to_type, size_t count) {
  if (!is_floating(from_type)) unsupported_dtype("convert", from_type);
  if (!is_floating(to_type)) unsupported_dtype("convert", to_type);
  const char* in = static_cast<const char*>(from);
  parallel_for(0, static_cast<int64_t>(count), 1 << 16, [&](int64_t begin, int64_t end) {
    const size_t b = static_cast<size_t>(begin), n = static_cast<size_t>(end - begin);
    if (from_type == to_type) {
      if (in != to)
        std::memcpy(static_cast<char*>(to) + b * size_of(to_type), in + b * size_of(to_type), n * size_of(to_type));
      return;
    }
    switch (from_type) {
      case DType::kF32:
        return convert_from<float>(in, to, to_type, b, n);
      case DType::kBF16:
        return convert_from<bf16>(in, to, to_type, b, n);
      case DType::kF16:
        return convert_from<f16>(in, to, to_type, b, n);
      default:
        return convert_from<double>(in, to, to_type, b, n);
    }
  });
}

}  // namespace lightmoe
