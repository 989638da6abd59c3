#pragma once
// Vectors of 64 bytes in the compilers' own notation (GCC and Clang): one AVX-512 register, several narrower ones elsewhere.
// Kernels that promise the same bits whatever surrounds a row use these instead of auto-vectorised reductions, whose order of
// summation may depend on alignment or on how a loop was cut.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/access.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // everything here is inlined, so no vector crosses a call
#endif

namespace lightmoe {

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(64)));
};
template <class C>
using Vec = typename VecOf<C>::type;
template <class C>
inline constexpr int64_t kLanes = 64 / static_cast<int64_t>(sizeof(C));

// Loads kLanes elements of any address, widened to the compute type.
template <class T>
[[gnu::always_inline]] inline Vec<compute_t<T>> load_vec(const T* p) {
  Vec<compute_t<T>> v;
  if constexpr (std::is_same_v<T, bf16>) {
    typedef uint16_t Half __attribute__((vector_size(32)));
    typedef uint32_t Wide __attribute__((vector_size(64)));
    Half bits;
    std::memcpy(&bits, p, sizeof(bits));
    const Wide wide = __builtin_convertvector(bits, Wide) << 16;
    std::memcpy(&v, &wide, sizeof(v));
  } else {
    std::memcpy(&v, p, sizeof(v));
  }
  return v;
}

// The first `count` elements, zeros behind them.
template <class T>
[[gnu::always_inline]] inline Vec<compute_t<T>> load_part(const T* p, int64_t count) {
  Vec<compute_t<T>> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = load(p, i);
  return v;
}

template <class C>
[[gnu::always_inline]] inline void store_vec(C* p, const Vec<C>& v) {
  std::memcpy(p, &v, sizeof(v));
}

// Sum of the lanes, halves first: the same order everywhere.
template <class C>
[[gnu::always_inline]] inline C sum_lanes(const Vec<C>& v) {
  C lanes[kLanes<C>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t half = kLanes<C> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace lightmoe
