#include "kernels/elementwise.h"

#include "kernels/access.h"
#include "kernels/cpu_math.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

// Pieces begin at multiples of this: whether an element falls into a vector or into a loop's tail does not depend on the threads.
constexpr int64_t kBlock = 1024;
constexpr int64_t kGrainBlocks = 16;

// f(begin, end) over pieces of [0, count).
template <class F>
void over_elements(int64_t count, F&& f) {
  parallel_for(0, (count + kBlock - 1) / kBlock, kGrainBlocks,
               [&](int64_t begin, int64_t end) { f(begin * kBlock, std::min(count, end * kBlock)); });
}

template <class A, class B>
using wider_t = std::conditional_t<std::is_same_v<A, double>, double, compute_t<B>>;

void add_cpu(const Add& op) {
  visit_floating("add", op.y.dtype(), [&]<class T>() {
    const T *a = op.a.data<T>(), *b = op.b.data<T>();
    T* y = op.y.data<T>();
    over_elements(op.y.numel(), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) store(y, i, load(a, i) + load(b, i));
    });
  });
}

void axpy_cpu(const Axpy& op) {
  visit_floating("axpy", op.y.dtype(), [&]<class Y>() {
    visit_floating("axpy", op.x.dtype(), [&]<class X>() {
      using C = wider_t<X, Y>;
      const X* x = op.x.data<X>();
      Y* y = op.y.data<Y>();
      const C alpha = static_cast<C>(op.alpha);
      over_elements(op.y.numel(), [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const C sum = static_cast<C>(load(y, i)) + alpha * static_cast<C>(load(x, i));
          store(y, i, static_cast<compute_t<Y>>(sum));
        }
      });
    });
  });
}

void scale_cpu(const Scale& op) {
  visit_floating("scale", op.y.dtype(), [&]<class T>() {
    const T* x = op.x.data<T>();
    T* y = op.y.data<T>();
    const compute_t<T> alpha = static_cast<compute_t<T>>(op.alpha);
    over_elements(op.y.numel(), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) store(y, i, alpha * load(x, i));
    });
  });
}

// The comparisons are written so that NaN passes through.
void clamp_cpu(const Clamp& op) {
  visit_floating("clamp", op.y.dtype(), [&]<class T>() {
    using C = compute_t<T>;
    const T* x = op.x.data<T>();
    T* y = op.y.data<T>();
    const C limit = static_cast<C>(op.limit);
    over_elements(op.y.numel(), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        C value = load(x, i);
        value = value < -limit ? -limit : value;
        value = value > limit ? limit : value;
        store(y, i, value);
      }
    });
  });
}

void clamp_backward_cpu(const ClampBackward& op) {
  visit_floating("clamp_backward", op.dx.dtype(), [&]<class T>() {
    using C = compute_t<T>;
    const T *x = op.x.data<T>(), *dy = op.dy.data<T>();
    T* dx = op.dx.data<T>();
    const C limit = static_cast<C>(op.limit);
    over_elements(op.dx.numel(), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const C value = load(x, i), gradient = load(dy, i);
        store(dx, i, value >= -limit && value <= limit ? gradient : C(0));
      }
    });
  });
}

template <class A, class B, class Y>
void blend(const Blend& op) {
  using C = compute_t<Y>;
  const A* a = op.a.data<A>();
  const B* b = op.b.data<B>();
  Y* y = op.y.data<Y>();
  const C beta = static_cast<C>(op.beta);
  over_elements(op.y.numel(), [=](int64_t begin, int64_t end) {
    if (beta == C(1)) {
      for (int64_t i = begin; i < end; ++i) store(y, i, load(a, i));
    } else if (beta == C(0)) {
      for (int64_t i = begin; i < end; ++i) store(y, i, load(b, i));
    } else {
      for (int64_t i = begin; i < end; ++i) store(y, i, load(b, i) + beta * (load(a, i) - load(b, i)));
    }
  });
}

void blend_cpu(const Blend& op) {
  if (op.y.dtype() == DType::kF64) return blend<double, double, double>(op);
  const auto visit = [](DType dtype, auto&& f) {
    if (dtype == DType::kF32) return f.template operator()<float>();
    if (dtype == DType::kBF16) return f.template operator()<bf16>();
    unsupported_dtype("blend", dtype);
  };
  visit(op.y.dtype(), [&]<class Y>() {
    visit(op.a.dtype(), [&]<class A>() { visit(op.b.dtype(), [&]<class B>() { blend<A, B, Y>(op); }); });
  });
}

void silu_cpu(const Silu& op) {
  visit_floating("silu", op.y.dtype(), [&]<class T>() {
    using C = compute_t<T>;
    const T* x = op.x.data<T>();
    T* y = op.y.data<T>();
    over_elements(op.y.numel(), [=](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        const C z = load(x, i);
        store(y, i, z * (C(1) / (C(1) + exp_of(-z))));
      }
    });
  });
}

void silu_backward_cpu(const SiluBackward& op) {
  visit_floating("silu_backward", op.dx.dtype(), [&]<class T>() {
    using C = compute_t<T>;
    const T *x = op.x.data<T>(), *dy = op.dy.data<T>();
    T* dx = op.dx.data<T>();
    over_elements(op.dx.numel(), [=](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        const C z = load(x, i), sigmoid = C(1) / (C(1) + exp_of(-z)), silu = z * sigmoid;
        store(dx, i, load(dy, i) * (sigmoid + silu * (C(1) - sigmoid)));
      }
    });
  });
}

const RegisterKernel<Add> register_add{DeviceKind::kCpu, &add_cpu};
const RegisterKernel<Axpy> register_axpy{DeviceKind::kCpu, &axpy_cpu};
const RegisterKernel<Scale> register_scale{DeviceKind::kCpu, &scale_cpu};
const RegisterKernel<Clamp> register_clamp{DeviceKind::kCpu, &clamp_cpu};
const RegisterKernel<ClampBackward> register_clamp_backward{DeviceKind::kCpu, &clamp_backward_cpu};
const RegisterKernel<Blend> register_blend{DeviceKind::kCpu, &blend_cpu};
const RegisterKernel<Silu> register_silu{DeviceKind::kCpu, &silu_cpu};
const RegisterKernel<SiluBackward> register_silu_backward{DeviceKind::kCpu, &silu_backward_cpu};

}  // namespace

void run(const Add& op) {
  require_tensor(op.a, "add", "a", op.y.shape(), op.y.dtype());
  require_tensor(op.b, "add", "b", op.y.shape(), op.y.dtype());
  dispatch(op, op.y.device(), "add");
}

void run(const Axpy& op) {
  require_tensor(op.x, "axpy", "x", op.y.shape(), op.x.dtype());
  dispatch(op, op.y.device(), "axpy");
}

void run(const Scale& op) {
  require_tensor(op.x, "scale", "x", op.y.shape(), op.y.dtype());
  dispatch(op, op.y.device(), "scale");
}

void run(const Clamp& op) {
  require(op.limit >= 0, "clamp: limit is {}, expected >= 0", op.limit);
  require_tensor(op.x, "clamp", "x", op.y.shape(), op.y.dtype());
  dispatch(op, op.y.device(), "clamp");
}

void run(const ClampBackward& op) {
  require(op.limit >= 0, "clamp_backward: limit is {}, expected >= 0", op.limit);
  require_tensor(op.x, "clamp_backward", "x", op.dx.shape(), op.dx.dtype());
  require_tensor(op.dy, "clamp_backward", "dy", op.dx.shape(), op.dx.dtype());
  dispatch(op, op.dx.device(), "clamp_backward");
}

void run(const Blend& op) {
  require(op.beta >= 0 && op.beta <= 1, "blend: beta is {}, expected 0..1", op.beta);
  require_tensor(op.a, "blend", "a", op.y.shape(), op.a.dtype());
  require_tensor(op.b, "blend", "b", op.y.shape(), op.b.dtype());
  dispatch(op, op.y.device(), "blend");
}

void run(const Silu& op) {
  require_tensor(op.x, "silu", "x", op.y.shape(), op.y.dtype());
  dispatch(op, op.y.device(), "silu");
}

void run(const SiluBackward& op) {
  require_tensor(op.x, "silu_backward", "x", op.dx.shape(), op.dx.dtype());
  require_tensor(op.dy, "silu_backward", "dy", op.dx.shape(), op.dx.dtype());
  dispatch(op, op.dx.device(), "silu_backward");
}

}  // namespace lightmoe
