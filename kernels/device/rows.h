#pragma once
// Kernels that give each row of a matrix its own block: how many threads, and which columns a thread takes.
//   for (int i = first_column<kV>(); i < n; i += column_step<kV>()) ...

#include "kernels/device/vector.h"

namespace lightmoe::LIGHTMOE_DEVICE {

inline constexpr int kMaxRowThreads = 256;

// A thread for each `vector` columns, in whole warps.
inline uint32_t row_threads(int64_t width, int vector) {
  return static_cast<uint32_t>(std::clamp<int64_t>(ceil_div(width, vector * 32) * 32, 32, kMaxRowThreads));
}
template <int kV>
DEVICE_FN int first_column() {
  return static_cast<int>(threadIdx.x) * kV;
}
template <int kV>
DEVICE_FN int column_step() {
  return static_cast<int>(blockDim.x) * kV;
}

// Elements in one step of a thread over rows of these types: 16 bytes of the narrowest.
template <class... T>
inline constexpr int kVectorOf = std::max({kVector<T>...});

}  // namespace lightmoe::LIGHTMOE_DEVICE
