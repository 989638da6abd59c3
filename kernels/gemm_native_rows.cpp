#include "kernels/gemm_native_rows.h"

#include <algorithm>
#include <array>
#include <utility>

#include "kernels/gemm_native_pack.h"
#include "kernels/gemm_native_tile.h"

namespace lightmoe::native {
namespace {

// Ahead in each of the kLanes rows of weights, and from the end of a row in the row that takes its place: rows are too short for the
// hardware to have found the way again before they end.
constexpr int64_t kPrefetchBytes = 512;

template <class T, class Mode>
constexpr bool kPairs = Mode::kPerStep == 2 || std::is_same_v<T, bf16>;

// sum[i] += a[step][i] times the transposed block, in the order of k. n values of k, at most those of kLanes dwords.
template <class T, class Mode, int kRows>
[[gnu::always_inline]] inline void add_block(const T* const (&weights)[kLanes], int64_t k, int n, const uint32_t* a,
                                             Floats (&sum)[kRows]) {
  Dwords block[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if constexpr (kPairs<T, Mode>)
      block[i] = load_pairs(weights[i] + k, n);
    else
      block[i] = as_dwords(load_floats(weights[i] + k, n));
  }
  transpose(block);
#pragma GCC unroll 32
  for (int s = 0; s < n; s += kPairs<T, Mode> ? 2 : 1) {
    const Dwords step = block[kPairs<T, Mode> ? s / 2 : s];
    if constexpr (kPairs<T, Mode> && Mode::kPerStep == 1) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) sum[i] = Mode::add(broadcast(a[i]), as_dwords(even_of(step)), sum[i]);
      a += kRows;
      if (s + 1 == n) break;
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) sum[i] = Mode::add(broadcast(a[i]), as_dwords(odd_of(step)), sum[i]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) sum[i] = Mode::add(broadcast(a[i]), step, sum[i]);
    }
    a += kRows;
  }
}

template <class T, class Mode, int kRows>
void multiply_columns(const GemmMatrix& b, int64_t k_end, int64_t begin, int64_t end, const uint32_t* a,
                      const TileOutput& out) {
  constexpr int kBlock = kPairs<T, Mode> ? 2 * kLanes : kLanes;
  constexpr int64_t kPrefetch = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  for (int64_t column = begin; column < end; column += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - column));
    const T* weights[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      weights[i] = static_cast<const T*>(b.data) + b.row_offset(column + std::min(i, count - 1));
    }
    Floats sum[kRows] = {};
    int64_t k = 0;
    const uint32_t* step = a;
    for (; k + kBlock <= k_end; k += kBlock, step += kRows * kBlock / Mode::kPerStep) {
      const int64_t ahead = k + kPrefetch < k_end ? k + kPrefetch : k + kPrefetch - k_end + kLanes * b.stride;
      for (int i = 0; i < kLanes; ++i) __builtin_prefetch(weights[i] + ahead, 0, 2);
      add_block<T, Mode, kRows>(weights, k, kBlock, step, sum);
    }
    if (k < k_end) add_block<T, Mode, kRows>(weights, k, static_cast<int>(k_end - k), step, sum);
    float sums[kRows * kLanes];
    for (int i = 0; i < kRows; ++i) store_vector(sums + i * kLanes, sum[i]);
    write_tile(out, 0, column, kRows, count, sums, kLanes);
  }
}

using Function = void (*)(const GemmMatrix&, int64_t, int64_t, int64_t, const uint32_t*, const TileOutput&);
template <class T, class Mode>
Function function_of(int64_t rows) {
  static constexpr auto kFunctions = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return std::array<Function, kFewRows>{&multiply_columns<T, Mode, static_cast<int>(kIndex) + 1>...};
  }
  (std::make_index_sequence<kFewRows>());
  return kFunctions[static_cast<size_t>(rows - 1)];
}

}  // namespace

void multiply_few_rows(const GemmProblem& p, const GemmProblems& all, int64_t begin, int64_t end) {
  const int64_t dwords = p.m * steps_of(all.compute, p.k) + kLanes;
  const auto scratch = Buffer::allocate(static_cast<size_t>(dwords) * 4, DeviceKind::kCpu, MemoryCategory::kScratch);
  uint32_t* a = static_cast<uint32_t*>(scratch->data());
  pack(panels_of_a(p, all.compute), Panels(0, p.m, 1, kFewRows), 0, 1, 0, p.k, steps_of(all.compute, p.k), a);
  const TileOutput out{p.c, p.c_dtype, p.c_stride, static_cast<float>(all.alpha), static_cast<float>(all.beta)};
  const bool narrow = p.b.dtype == DType::kBF16, in_bf16 = all.compute == GemmCompute::kBF16;
  const Function in_f32_function = narrow ? function_of<bf16, InF32>(p.m) : function_of<float, InF32>(p.m);
  const Function in_bf16_function = narrow ? function_of<bf16, InBF16>(p.m) : function_of<float, InBF16>(p.m);
  (in_bf16 ? in_bf16_function : in_f32_function)(p.b, p.k, begin, end, a, out);
}

}  // namespace lightmoe::native
