#pragma once
// Rows of f32 or bf16 in 16-byte accesses, computed on as f32. A row whose start or width does not allow 16-byte accesses is read element
// by element, so that kernels have one loop for every width:
//   const bool aligned = aligned_rows(n, x, y);                                    // same for all threads, once on the host
//   for (int i = threadIdx.x * kVector<T>; i < n; i += blockDim.x * kVector<T>) {
//     Floats<kVector<T>> v = load_floats<kVector<T>>(row, i, n, aligned);          // zeros from n on
//     store_floats(out, i, n, aligned, v);                                         // nothing from n on
//   }

#include "kernels/device/numeric.h"

namespace lightmoe::LIGHTMOE_DEVICE {

template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <int kCount>
struct Floats {
  float v[kCount];
  DEVICE_FN float& operator[](int i) { return v[i]; }
  DEVICE_FN const float& operator[](int i) const { return v[i]; }
};

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// One access of 16 bytes; the address must be a multiple of 16.
DEVICE_FN Bytes16 load_16(const void* p SITE) {
#if !defined(__CUDACC__)
  simulator::check_alignment(p, 16, site_);
#endif
  return *static_cast<const Bytes16*>(p);
}
DEVICE_FN void store_16(void* p, const Bytes16& value SITE) {
#if !defined(__CUDACC__)
  simulator::check_alignment(p, 16, site_);
#endif
  *static_cast<Bytes16*>(p) = value;
}

// May rows of width n that start at these addresses be read 16 bytes at a time?
template <class... T>
bool aligned_rows(int64_t n, const T*... rows) {
  return ((n % kVector<T> == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0) && ...);
}

DEVICE_FN void unpack(const Bytes16& raw, float* out, const float*) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = std::bit_cast<float>(raw.word[i]);
}
DEVICE_FN void unpack(const Bytes16& raw, float* out, const bf16*) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = first_bf16(raw.word[i]);
    out[2 * i + 1] = second_bf16(raw.word[i]);
  }
}
DEVICE_FN Bytes16 pack(const float* values, const float*) {
  Bytes16 raw;
#pragma unroll
  for (int i = 0; i < 4; ++i) raw.word[i] = std::bit_cast<uint32_t>(values[i]);
  return raw;
}
DEVICE_FN Bytes16 pack(const float* values, const bf16*) {
  Bytes16 raw;
#pragma unroll
  for (int i = 0; i < 4; ++i) raw.word[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
  return raw;
}

template <int kCount, class T>
DEVICE_FN Floats<kCount> load_floats(const T* row, int64_t i, int64_t n, bool aligned SITE) {
  Floats<kCount> out;
  if constexpr (kCount % kVector<T> == 0) {
    if (aligned && i + kCount <= n) {
#pragma unroll
      for (int k = 0; k < kCount; k += kVector<T>) unpack(load_16(row + i + k HERE), out.v + k, row);
      return out;
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) out.v[k] = i + k < n ? to_float(row[i + k]) : 0.0f;
  return out;
}

template <int kCount, class T>
DEVICE_FN void store_floats(T* row, int64_t i, int64_t n, bool aligned, const Floats<kCount>& values SITE) {
  if constexpr (kCount % kVector<T> == 0) {
    if (aligned && i + kCount <= n) {
#pragma unroll
      for (int k = 0; k < kCount; k += kVector<T>) store_16(row + i + k, pack(values.v + k, row) HERE);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (i + k < n) row[i + k] = from_float<T>(values.v[k]);
  }
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
