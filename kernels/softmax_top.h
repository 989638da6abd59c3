#pragma once
// Weights within a row [R,N], as small gates use them (a router's own: kernels/router.h). Ties go to the lower column.
//   SoftmaxTop           p = softmax over the k largest of scale z, 0 elsewhere
//   SoftmaxTopBackward   dz = scale p (dp - <p, dp>)                              (nothing flows where p = 0)
//   KeepLargest          y = 1 at the k largest of x, 0 elsewhere
//   ShareOfRow           y = x / sum of its row; 0 where that sum is 0
//   ShareOfRowBackward   dx = (dy - <y, dy>) / sum of x's row; 0 where that sum is 0
// k from 1 to N (KeepLargest: from 0).  dtypes: f32/bf16/f64, one type; sums in f64 on the CPU, in f32 on a GPU, in a fixed order. '='.
// No aliasing. On a GPU a warp takes a row and compares all pairs of its columns: N up to some hundreds is what this is for.

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct SoftmaxTop {
  Tensor z;
  int64_t k = 1;
  double scale = 1;
  Tensor p;
};
struct SoftmaxTopBackward {
  Tensor p, dp;
  double scale = 1;
  Tensor dz;
};
struct KeepLargest {
  Tensor x;
  int64_t k = 1;
  Tensor y;
};
struct ShareOfRow {
  Tensor x, y;
};
struct ShareOfRowBackward {
  Tensor x, y, dy, dx;
};
void run(const SoftmaxTop& op);
void run(const SoftmaxTopBackward& op);
void run(const KeepLargest& op);
void run(const ShareOfRow& op);
void run(const ShareOfRowBackward& op);

}  // namespace lightmoe
