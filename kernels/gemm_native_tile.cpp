#include "kernels/gemm_native_tile.h"

#include <array>
#include <utility>

namespace lightmoe::native {
namespace {

// What C becomes: the same operations wherever a row is written.
inline Floats updated(Floats sum, Floats c, Floats alpha, Floats beta, bool keep) {
  const Floats product = alpha * sum;
  return keep ? multiply_add(beta, c, product) : product;
}

template <class Mode, int kRows, int kVectors>
void multiply_tile(const TileCall& call) {
  Floats sum[kRows][kVectors] = {};
  if (!call.first) {
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = load_vector<Floats>(call.sums + (i * kVectors + v) * kLanes);
    }
  }
  const uint32_t* __restrict a = call.a, * __restrict b = call.b;
  for (int64_t s = 0; s < call.steps; ++s) {
    Dwords right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load_vector<Dwords>(b + v * kLanes);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      const Dwords left = broadcast(a[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Mode::add(left, right[v], sum[i][v]);
    }
    a += kRows, b += kVectors * kLanes;
  }
  const bool finish = call.c != nullptr;
  float* to = finish ? call.c : call.sums;
  const int64_t stride = finish ? call.stride : kVectors * kLanes;
  const Floats alpha = broadcast(finish ? call.alpha : 1), beta = broadcast(call.beta);
  const bool keep = finish && call.beta != 0;
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* at = to + i * stride + v * kLanes;
      store_vector(at, updated(sum[i][v], keep ? load_vector<Floats>(at) : Floats{}, alpha, beta, keep));
    }
  }
}

template <class Mode, int kVectors, size_t... kIndex>
constexpr std::array<TileFunction, kMaxRows> row_functions(std::index_sequence<kIndex...>) {
  return {&multiply_tile<Mode, static_cast<int>(kIndex) + 1, kVectors>...};
}
template <class Mode>
TileFunction function_of(int rows, int vectors) {
  constexpr auto kRows = std::make_index_sequence<kMaxRows>();
  static constexpr std::array<TileFunction, kMaxRows> kOne = row_functions<Mode, 1>(kRows);
  static constexpr std::array<TileFunction, kMaxRows> kTwo = row_functions<Mode, 2>(kRows);
  return (vectors == 1 ? kOne : kTwo)[static_cast<size_t>(rows - 1)];
}

template <class T>
void write_row(T* c, const float* sums, int columns, Floats alpha, Floats beta, bool keep) {
  for (int j = 0; j < columns; j += kLanes) {
    const int n = columns - j < kLanes ? columns - j : kLanes;
    store_floats(c + j, updated(load_floats(sums + j, n), keep ? load_floats(c + j, n) : Floats{}, alpha, beta, keep),
                 n);
  }
}

}  // namespace

TileFunction tile_function(GemmCompute compute, int rows, int vectors) {
  return compute == GemmCompute::kBF16 ? function_of<InBF16>(rows, vectors) : function_of<InF32>(rows, vectors);
}

void write_tile(const TileOutput& out, int64_t row, int64_t column, int rows, int columns, const float* sums,
                int64_t sums_stride) {
  const Floats alpha = broadcast(out.alpha), beta = broadcast(out.beta);
  const bool keep = out.beta != 0;
  for (int i = 0; i < rows; ++i) {
    const int64_t at = (row + i) * out.stride + column;
    const float* from = sums + i * sums_stride;
    if (out.dtype == DType::kF32)
      write_row(static_cast<float*>(out.c) + at, from, columns, alpha, beta, keep);
    else
      write_row(static_cast<bf16*>(out.c) + at, from, columns, alpha, beta, keep);
  }
}

}  // namespace lightmoe::native
