#pragma once
// s = x + residual (s = x without residual);  y = s * rstd * w,  rstd = 1 / sqrt(mean(s^2) + eps)
//   Hugging Face modeling_olmoe.py OlmoeRMSNorm, after OlmoeDecoderLayer's hidden_states = residual + hidden_states
// backward: ds = rstd * (dy w - s rstd^2 mean(dy w s)) + dsum,  dw += sum_t dy s rstd;  dsum: the gradient of s from its other readers
// shapes: x, residual, sum, y, dy, dsum, dx [T,N]; w, dw [N]; rstd [T].   dtypes: rows f32/bf16/f64 (one type); w of x's
//   type or f32; rstd f32 (f64 for f64); sums in f32 (f64). HF rounds s, and s*rstd before the product with w, to x's type.
// writes: sum, y, rstd, dx with '='; dw with '+='.  rstd may be undefined in forward (not kept); dw, dsum may be undefined.
// aliasing: y may be x; sum may be x or residual; dx may be dy or dsum.  Deterministic.
// moves 2 T N elements forward (4 T N with a residual), 3 T N backward (4 T N with dsum).

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct RmsNorm {
  Tensor x, w;
  double eps = 1e-5;
  Tensor y, rstd;
  Tensor residual, sum;  // both or none
};
struct RmsNormBackward {
  Tensor x, w, rstd, dy;  // x: s of the forward pass
  Tensor dx, dw;
  Tensor dsum;
};
void run(const RmsNorm& op);
void run(const RmsNormBackward& op);

}  // namespace lightmoe
