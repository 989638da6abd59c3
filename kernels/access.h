#pragma once
// Loads and stores of the plain CPU kernels: elements of type T, arithmetic in compute_t<T>.

#include <cstdint>
#include <type_traits>

#include "runtime/dtype.h"

namespace lightmoe {

template <class T>
inline compute_t<T> load(const T* p, int64_t i) {
  return static_cast<compute_t<T>>(p[i]);
}
template <class T>
inline void store(T* p, int64_t i, compute_t<T> value) {
  p[i] = static_cast<T>(value);
}

// The type sums, statistics and gates are kept in: f64 beside f64, else f32.
inline DType accumulator_of(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

// Calls f.template operator()<W>() for a weight that has the activation's type T or is f32 or bf16.
template <class T, class F>
void visit_weight(const char* op, DType dtype, F&& f) {
  if (dtype == dtype_of<T>) return f.template operator()<T>();
  if constexpr (!std::is_same_v<T, double>) {
    if (dtype == DType::kF32) return f.template operator()<float>();
    if (dtype == DType::kBF16) return f.template operator()<bf16>();
  }
  unsupported_dtype(op, dtype);
}

}  // namespace lightmoe
