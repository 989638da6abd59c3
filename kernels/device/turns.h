#pragma once
// Cosine and sine of large angles given in whole turns, for rotary embeddings.

#include <cmath>

#include "kernels/device/simt.h"

namespace lightmoe::LIGHTMOE_DEVICE {

#if defined(__CUDACC__)
DEVICE_FN void sin_cos_pi(float x, float* s, float* c) { sincospif(x, s, c); }
#else
DEVICE_FN void sin_cos_pi(float x, float* s, float* c) {
  *s = static_cast<float>(std::sin(3.14159265358979323846 * static_cast<double>(x)));
  *c = static_cast<float>(std::cos(3.14159265358979323846 * static_cast<double>(x)));
}
#endif

// A turn by `turns` times 2 pi. The whole turns are taken off in f64, so that the f32 functions see an angle within [-pi, pi];
// what rounding it to f32 loses is put back to first order.
DEVICE_FN void turn_by(double turns, float* cosine, float* sine) {
  const double angle = 2 * (turns - rint(turns));  // in units of pi
  const auto rounded = static_cast<float>(angle);
  const float rest = static_cast<float>(angle - static_cast<double>(rounded)) * 3.14159265f;
  float s, c;
  sin_cos_pi(rounded, &s, &c);
  *cosine = c - rest * s;
  *sine = s + rest * c;
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
