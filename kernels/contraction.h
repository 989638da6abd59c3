#pragma once
// Sums of products over strided views, for small movements that have no kernel of their own: blocks of columns, mixtures, copies.
//   y[i,j,k] (=|+=) sum_{r < terms} a[i,j,k,r] * b[i,j,k,r],  0 <= (i,j,k) < shape;  b undefined: 1
// The element (i,j,k,r) of an operand is its tensor's element  begin + i stride[0] + j stride[1] + k stride[2] + r step;  y has no step and
// names no element twice.
// dtypes: a, b, y f32/bf16/f64, one type; sums in f64, in a fixed order. No aliasing but y = a with the same strides.
// performance: a thread for an output, a block for one where terms are many: for what is small beside the experts' products.

#include <array>

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct StridedView {
  Tensor tensor;
  std::array<int64_t, 3> stride = {};
  int64_t step = 0, begin = 0;
};
struct Contraction {
  std::array<int64_t, 3> shape = {1, 1, 1};
  int64_t terms = 1;
  StridedView a, b, y;
  bool accumulate = false;
};
void run(const Contraction& op);

// All elements after each other, and a * b element by element, in memory of its own.
inline StridedView flat(const Tensor& t) { return {t, {0, 0, 1}}; }
Tensor elementwise_product(const Tensor& a, const Tensor& b);

}  // namespace lightmoe
