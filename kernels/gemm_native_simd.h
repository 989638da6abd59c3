#pragma once
// The vector of the native GEMM: 16 lanes with AVX-512, 8 with AVX, else 4.
// Factors travel as dwords: one f32, or two bf16 that are neighbours in k (the even one in the low half).
// All that differs between machines stands here.

#include <bit>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LIGHTMOE_AVX512 1
#endif

#include "runtime/dtype.h"

namespace lightmoe::native {

#ifdef LIGHTMOE_AVX512
inline constexpr int kLanes = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Dwords __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Words __attribute__((vector_size(kLanes * 2)));

template <class V, class T>
inline V load_vector(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store_vector(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline Dwords as_dwords(Floats v) { return std::bit_cast<Dwords>(v); }
inline Floats as_floats(Dwords v) { return std::bit_cast<Floats>(v); }
inline Dwords widened(Words v) { return __builtin_convertvector(v, Dwords); }
inline Dwords broadcast(uint32_t value) { return Dwords{} + value; }
inline Floats broadcast(float value) { return as_floats(broadcast(std::bit_cast<uint32_t>(value))); }

// Both factors of a pair.
inline Floats even_of(Dwords pairs) { return as_floats(pairs << 16); }
inline Floats odd_of(Dwords pairs) { return as_floats(pairs & 0xffff0000u); }

// sum + a * b, with one rounding where the machine has it.
inline Floats multiply_add(Floats a, Floats b, Floats sum) {
#ifdef LIGHTMOE_AVX512
  return std::bit_cast<Floats>(
      _mm512_fmadd_ps(std::bit_cast<__m512>(a), std::bit_cast<__m512>(b), std::bit_cast<__m512>(sum)));
#else
  return sum + a * b;
#endif
}

// The first n of kLanes elements, zeros behind them; exactly those n are read or written.
inline Floats load_first(const float* p, int n) {
#ifdef LIGHTMOE_AVX512
  return std::bit_cast<Floats>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
#else
  Floats v{};
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof *p);
  return v;
#endif
}
inline Words load_first(const bf16* p, int n) {
#ifdef LIGHTMOE_AVX512
  return std::bit_cast<Words>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
#else
  Words v{};
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof *p);
  return v;
#endif
}
inline void store_first(float* p, Floats v, int n) {
#ifdef LIGHTMOE_AVX512
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), std::bit_cast<__m512>(v));
#else
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof *p);
#endif
}
inline void store_first(bf16* p, Words v, int n) {
#ifdef LIGHTMOE_AVX512
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), std::bit_cast<__m256i>(v));
#else
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof *p);
#endif
}

// bf16(float) of every lane, as dtype.h rounds: subnormals are kept, NaN stays NaN.
inline Words rounded(Floats v) {
  const Dwords u = as_dwords(v), nearest = u + 0x7fffu + ((u >> 16) & 1u), nan = (u & 0x7fffffffu) > 0x7f800000u;
  return __builtin_convertvector((nan & ((u >> 16) | 0x40u)) | (~nan & (nearest >> 16)), Words);
}
// The same as a factor. NOTE: vcvtneps2bf16 takes subnormals as zero, as the multiplication after it does.
inline Words rounded_factor(Floats v) {
#if defined(LIGHTMOE_AVX512) && defined(__AVX512BF16__)
  return std::bit_cast<Words>(_mm512_cvtneps_pbh(std::bit_cast<__m512>(v)));
#else
  return rounded(v);
#endif
}

inline Floats load_floats(const float* p, int n) { return n == kLanes ? load_vector<Floats>(p) : load_first(p, n); }
inline Words load_words(const bf16* p, int n) { return n == kLanes ? load_vector<Words>(p) : load_first(p, n); }
inline Floats load_floats(const bf16* p, int n) { return as_floats(widened(load_words(p, n)) << 16); }
inline Words load_words(const float* p, int n) { return rounded_factor(load_floats(p, n)); }
inline void store_floats(float* p, Floats v, int n) { n == kLanes ? store_vector(p, v) : store_first(p, v, n); }
inline void store_floats(bf16* p, Floats v, int n) {
  n == kLanes ? store_vector(p, rounded(v)) : store_first(p, rounded(v), n);
}

// kLanes dwords of pairs from the first n of 2 kLanes consecutive elements.
// NOTE: not joined from halves where that can be helped: they pass through the stack, and two stores do not forward to one load.
inline Dwords load_pairs(const bf16* p, int n) {
  if (n == 2 * kLanes) return load_vector<Dwords>(p);
  const Words halves[2] = {load_words(p, n < kLanes ? n : kLanes),
                           n > kLanes ? load_words(p + kLanes, n - kLanes) : Words{}};
  return std::bit_cast<Dwords>(halves);
}
inline Dwords load_pairs(const float* p, int n) {
  const Floats low = load_floats(p, n < kLanes ? n : kLanes),
               high = n > kLanes ? load_floats(p + kLanes, n - kLanes) : Floats{};
#if defined(LIGHTMOE_AVX512) && defined(__AVX512BF16__)
  return std::bit_cast<Dwords>(_mm512_cvtne2ps_pbh(std::bit_cast<__m512>(high), std::bit_cast<__m512>(low)));
#else
  const Words halves[2] = {rounded_factor(low), rounded_factor(high)};
  return std::bit_cast<Dwords>(halves);
#endif
}

// t[i][j] <-> t[j][i]
inline void transpose(Dwords (&t)[kLanes]) {
#ifdef LIGHTMOE_AVX512
  // NOTE: the zero-masking forms, because g++ 12 warns about its own headers' undefined vectors in the plain ones.
  constexpr __mmask16 kAll = 0xffff;
  constexpr __mmask8 kAll8 = 0xff;
  __m512i r[16], q[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    const __m512i even = std::bit_cast<__m512i>(t[i]), odd = std::bit_cast<__m512i>(t[i + 1]);
    r[i] = _mm512_maskz_unpacklo_epi32(kAll, even, odd), r[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, even, odd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      q[i + 2 * half] = _mm512_maskz_unpacklo_epi64(kAll8, r[i + half], r[i + 2 + half]);
      q[i + 2 * half + 1] = _mm512_maskz_unpackhi_epi64(kAll8, r[i + half], r[i + 2 + half]);
    }
  }
  // q[4 g + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 g .. 4 g + 3, one column per 128-bit lane.
  constexpr int kEvenLanes = 0x88, kOddLanes = 0xdd;
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const __m512i even = _mm512_maskz_shuffle_i32x4(kAll, q[c], q[4 + c], kEvenLanes);
    const __m512i odd = _mm512_maskz_shuffle_i32x4(kAll, q[c], q[4 + c], kOddLanes);
    const __m512i even2 = _mm512_maskz_shuffle_i32x4(kAll, q[8 + c], q[12 + c], kEvenLanes);
    const __m512i odd2 = _mm512_maskz_shuffle_i32x4(kAll, q[8 + c], q[12 + c], kOddLanes);
    t[c] = std::bit_cast<Dwords>(_mm512_maskz_shuffle_i32x4(kAll, even, even2, kEvenLanes));
    t[c + 4] = std::bit_cast<Dwords>(_mm512_maskz_shuffle_i32x4(kAll, odd, odd2, kEvenLanes));
    t[c + 8] = std::bit_cast<Dwords>(_mm512_maskz_shuffle_i32x4(kAll, even, even2, kOddLanes));
    t[c + 12] = std::bit_cast<Dwords>(_mm512_maskz_shuffle_i32x4(kAll, odd, odd2, kOddLanes));
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const uint32_t kept = t[i][j];
      t[i][j] = t[j][i], t[j][i] = kept;
    }
  }
#endif
}

// How factors are multiplied: what one dword of A and B adds to a sum, over kPerStep values of k.
struct InF32 {
  static constexpr int64_t kPerStep = 1;
  static Floats add(Dwords a, Dwords b, Floats sum) { return multiply_add(as_floats(a), as_floats(b), sum); }
};
// NOTE: vdpbf16ps takes subnormals as zero and rounds after each of its two products.
struct InBF16 {
  static constexpr int64_t kPerStep = 2;
  static Floats add(Dwords a, Dwords b, Floats sum) {
#if defined(LIGHTMOE_AVX512) && defined(__AVX512BF16__)
    return std::bit_cast<Floats>(
        _mm512_dpbf16_ps(std::bit_cast<__m512>(sum), std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b)));
#else
    return multiply_add(odd_of(a), odd_of(b), multiply_add(even_of(a), even_of(b), sum));
#endif
  }
};

}  // namespace lightmoe::native
