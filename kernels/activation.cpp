#include "kernels/activation.h"

#include <cmath>
#include <numbers>

#include "kernels/access.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kGrain = 1 << 12;

double value_at(Activation kind, double x) {
  switch (kind) {
    case Activation::kGelu:
      return .5 * x * (1 + std::erf(x * std::numbers::sqrt2 / 2));
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-x));
    case Activation::kOpen:
      return x > .5 ? 1 : 0;
    case Activation::kIsZero:
      return x == 0 ? 1 : 0;
    case Activation::kAbs:
      return std::abs(x);
    case Activation::kSqrt:
      return std::sqrt(x);
  }
  return 0;
}

double slope_at(Activation kind, double x) {
  const double y = value_at(kind, x);
  switch (kind) {
    case Activation::kGelu:
      return .5 * (1 + std::erf(x * std::numbers::sqrt2 / 2)) +
             x * std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi);
    case Activation::kTanh:
      return 1 - y * y;
    case Activation::kSigmoid:
      return y * (1 - y);
    case Activation::kOpen:
    case Activation::kIsZero:
      return 0;
    case Activation::kAbs:
      return x > 0 ? 1 : x < 0 ? -1 : 0;
    case Activation::kSqrt:
      return x > 0 ? .5 / y : 0;
  }
  return 0;
}

// to[i] = f(i), a double
template <class T, class F>
void fill(const Tensor& to, F&& f) {
  T* out = to.data<T>();
  parallel_for(0, to.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) store(out, i, static_cast<compute_t<T>>(f(i)));
  });
}

void forward_cpu(const Activate& op) {
  visit_floating("activate", op.x.dtype(), [&]<class T>() {
    const T* x = op.x.data<T>();
    fill<T>(op.y, [&](int64_t i) { return value_at(op.kind, static_cast<double>(load(x, i))); });
  });
}

void backward_cpu(const ActivateBackward& op) {
  visit_floating("activate_backward", op.x.dtype(), [&]<class T>() {
    const T *x = op.x.data<T>(), *dy = op.dy.data<T>();
    fill<T>(op.dx, [&](int64_t i) {
      return slope_at(op.kind, static_cast<double>(load(x, i))) * static_cast<double>(load(dy, i));
    });
  });
}

const RegisterKernel<Activate> register_forward{DeviceKind::kCpu, &forward_cpu};
const RegisterKernel<ActivateBackward> register_backward{DeviceKind::kCpu, &backward_cpu};

}  // namespace

void run(const Activate& op) {
  require_tensor(op.y, "activate", "y", op.x.shape(), op.x.dtype());
  dispatch(op, op.x.device(), "activate");
}

void run(const ActivateBackward& op) {
  require_tensor(op.dy, "activate_backward", "dy", op.x.shape(), op.x.dtype());
  require_tensor(op.dx, "activate_backward", "dx", op.x.shape(), op.x.dtype());
  dispatch(op, op.x.device(), "activate_backward");
}

}  // namespace lightmoe
