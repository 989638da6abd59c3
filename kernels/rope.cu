#include "kernels/rope.h"

#include <cmath>

#include "kernels/device/rows.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

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

// One token: its turns into shared memory, cosines then sines; then all heads.
template <class T>
__global__ void __launch_bounds__(kMaxRowThreads)
    rope_kernel(const T* x, const int* positions, T* y, int width, int half, double log2_theta, float direction,
                bool aligned) {
  constexpr int kV = kVector<T>;
  auto* cosine = &shared_memory<float>();
  float* sine = cosine + half;
  const auto position = static_cast<double>(positions[blockIdx.x]);
  for (int i = static_cast<int>(threadIdx.x); i < half; i += static_cast<int>(blockDim.x)) {
    const double frequency = exp2(-log2_theta * static_cast<double>(i) / static_cast<double>(half));
    float s;
    turn_by(position * frequency * 0.15915494309189535, &cosine[i], &s);
    sine[i] = direction * s;
  }
  sync_block();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
  const int steps = ceil_div(half, kV), total = width / (2 * half) * steps;  // a step: kV pairs of one head
  for (int step = static_cast<int>(threadIdx.x); step < total; step += static_cast<int>(blockDim.x)) {
    const int64_t head = row + static_cast<int64_t>(step / steps) * 2 * half;
    const int i = step % steps * kV;
    auto low = load_floats<kV>(x + head, i, half, aligned), high = load_floats<kV>(x + head + half, i, half, aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k) {
      const int j = i + k < half ? i + k : 0;
      const float a = low[k], b = high[k];
      low[k] = a * cosine[j] - b * sine[j];
      high[k] = b * cosine[j] + a * sine[j];
    }
    store_floats(y + head, i, half, aligned, low);
    store_floats(y + head + half, i, half, aligned, high);
  }
}

void rotate_device(const Rope& op) {
  visit_device_floating("rope", op.x.dtype(), [&]<class T>() {
    const int width = static_cast<int>(op.x.dim(1)), half = static_cast<int>(op.head_dim / 2);
    const T* x = op.x.data<T>();
    T* y = op.y.data<T>();
    launch<rope_kernel<T>>({.blocks = {uint32_t(op.x.dim(0))},
                            .threads = {row_threads(width / 2, kVector<T>)},
                            .shared_bytes = static_cast<size_t>(op.head_dim) * sizeof(float)},
                           x, op.positions.data<int32_t>(), y, width, half, std::log2(op.theta),
                           op.inverse ? -1.0f : 1.0f, aligned_rows(half, x, y));
  });
}
const RegisterKernel<Rope> register_rope{kDevice, &rotate_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
