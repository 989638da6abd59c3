#pragma once
// Movements by index.
//   Lookup       y[i] = index[i] < 0 ? -1 : table[index[i]]                     integers
//   ScatterRows  y[index[r],:] = x[r,:], rows of index -1 are left out          rows, converted to y's type
// shapes: table i32 [N]; index, y of Lookup i32, any one shape, values in [-1,N);  x [R,D], index of ScatterRows i32 [R] with values in
//   [-1,M), each row of y named at most once, y [M,D]; other rows of y are not touched.
// dtypes: x, y f32/bf16 in any pair, or both f64 (cpu). bf16 rounds to nearest, ties to even. Indices are checked on the CPU only: the
//   host does not read a GPU's. Deterministic. No aliasing.

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct Lookup {
  Tensor table, index;
  Tensor y;
};
struct ScatterRows {
  Tensor x, index;
  Tensor y;
};
void run(const Lookup& op);
void run(const ScatterRows& op);

}  // namespace lightmoe
