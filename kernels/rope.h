#pragma once
// Rotary embedding, rotate-half form (Hugging Face apply_rotary_pos_emb): for i < Hd/2, angle a = pos * theta^(-2i/Hd),
//   y[i] = x[i] cos a - x[i+Hd/2] sin a,   y[i+Hd/2] = x[i+Hd/2] cos a + x[i] sin a.   inverse = true rotates by -a (backward).
// shapes: x, y [T, H*Hd]; positions i32 [T], >= 0.  dtypes: x, y f32/bf16/f64 (one type); angles in f64, cos and sin in f32 (f64).
// writes: y with '='.  aliasing: y may be x.  Deterministic.

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct Rope {
  Tensor x, positions;
  int64_t head_dim = 0;
  double theta = 10000;
  bool inverse = false;
  Tensor y;
};
void run(const Rope& op);

}  // namespace lightmoe
