#pragma once
// Mathematical functions that compilers turn into vector code inside a plain loop.
// exp_of(float): within 0.95 ulp over the whole range incl. subnormal results, exp(-inf) = 0, overflow to inf at 88.7228,
//   NaN stays NaN (tests/cpu_math_test.cpp measures it). exp_of(double) is std::exp.

#include <bit>
#include <cmath>
#include <cstdint>

namespace lightmoe {

inline double exp_of(double x) { return std::exp(x); }

// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2; e^r by a polynomial of degree 6.
inline float exp_of(float x) {
  // Beyond these the result is 0 or inf anyhow; the bounds keep n inside what two scale factors can express.
  x = x < -110.0f ? -110.0f : x;
  x = x > 90.0f ? 90.0f : x;
  constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440054690583e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  // Minimax of (e^r - 1 - r) / r^2 for the relative error of e^r (Remez exchange): 0.05 * 2^-24.
  float p = 1.3814540087345637e-3f;
  p = p * r + 8.368745107530051e-3f;
  p = p * r + 4.166839078535053e-2f;
  p = p * r + 1.6666520399058002e-1f;
  p = p * r + 4.9999993432120377e-1f;
  p = p * (r * r) + r;
  // 2^n in two factors: n reaches -159 (subnormal results need two roundings at most) and 130.
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  const int32_t half = exponent >> 1;
  const float scale1 = std::bit_cast<float>((half + 127) << 23);
  const float scale2 = std::bit_cast<float>((exponent - half + 127) << 23);
  return (p * scale1 + scale1) * scale2;
}

}  // namespace lightmoe
