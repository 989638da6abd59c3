#pragma once
// Loops over elements and rows that the ops of extensions share (autograd/extension_ops.h): f32 or f64 on the host.

#include <type_traits>

#include "autograd/tape.h"
#include "runtime/parallel.h"

namespace lightmoe::extension_loops {

// f(T*) for the tensor's type.
template <class F>
void typed(const Tensor& t, F&& f) {
  if (t.dtype() == DType::kF64) return f(static_cast<double*>(nullptr));
  f(static_cast<float*>(nullptr));
}

// The output of an op: forward(T*, y) fills it.
template <class Forward>
Var made(const Shape& shape, DType dtype, bool needs, Forward&& forward) {
  const Var y = Tape::output(Tensor::empty(shape, dtype), needs);
  typed(y.value, [&](auto* type) { forward(type, y.value); });
  return y;
}

template <class T>
T* row(const Tensor& t, int64_t i) {
  return t.data<T>() + i * t.dim(1);
}

// y[i] = f(i, T*), in double, of the type and shape of `like`.
template <class F>
Tensor elementwise(const Tensor& like, F&& f) {
  const Tensor y = Tensor::empty(like.shape(), like.dtype());
  typed(like, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(0, like.numel(), 1 << 12, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) y.data<T>()[i] = static_cast<T>(f(i, type));
    });
  });
  return y;
}

template <class T>
double at(const Tensor& t, int64_t i, T*) {
  return static_cast<double>(t.data<T>()[i]);
}

inline Tensor product_of(const Tensor& a, const Tensor& b) {
  return elementwise(a, [&](int64_t i, auto* type) { return at(a, i, type) * at(b, i, type); });
}

}  // namespace lightmoe::extension_loops
