#pragma once
// Kernels that give each row of a matrix its own block: how many threads, and which columns a thread takes.
//   for (int i = first_column<kV>(); i < n; i += column_step<kV>()) ...

#include "kernels/device/vector.h"

namespace lightmoe::LIGHTMOE_DEVICE {

inline constexpr int kMaxRowThreads = 256;
inline constexpr int kAhead = 4;  // rows of add_rows on their way at a time

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

// sum += weight(j) times columns i.. of x's row row(j), for j = begin .. end - 1 in this order; a row of -1 is left out. kAhead rows are
// on their way at a time, because each waits for its index first.
template <int kV, class T, class Row, class Weight>
DEVICE_FN void add_rows(Floats<kV>& sum, const T* x, int64_t begin, int64_t end, const Row& row, const Weight& weight,
                        int i, int n, bool aligned) {
  for (int64_t j = begin; j < end; j += kAhead) {
    int64_t from[kAhead];
    Floats<kV> values[kAhead];
    float factor[kAhead];
#pragma unroll
    for (int q = 0; q < kAhead; ++q) from[q] = j + q < end ? row(j + q) : -1;
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      values[q] = {};
      factor[q] = 0;
      if (from[q] < 0) continue;
      factor[q] = weight(j + q);
      values[q] = load_floats<kV>(x + from[q] * n, i, n, aligned);
    }
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
#pragma unroll
      for (int k = 0; k < kV; ++k) sum[k] += factor[q] * values[q][k];
    }
  }
}

// Elements in one step of a thread over rows of these types: 16 bytes of the narrowest.
template <class... T>
inline constexpr int kVectorOf = std::max({kVector<T>...});

}  // namespace lightmoe::LIGHTMOE_DEVICE
