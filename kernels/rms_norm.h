#pragma once
// y = x * rstd * w,  rstd = 1 / sqrt(mean(x^2) + eps)        Hugging Face modeling_olmoe.py OlmoeRMSNorm
// backward: dx = rstd * (dy w - x rstd^2 mean(dy w x)),  dw += sum_t dy x rstd
// shapes: x, y, dx, dy [T,N]; w, dw [N]; rstd [T].   dtypes: x, y, dy, dx f32/bf16/f64 (one type); w of x's
//   type or f32; rstd f32 (f64 for f64); sums in f32 (f64). HF rounds x*rstd to x's type before the product with w.
// writes: y, rstd, dx with '='; dw with '+='.  rstd may be undefined in forward (not kept); dw may be undefined.
// aliasing: y may be x, dx may be dy.  Deterministic.  moves 2 T N elements forward, 3 T N backward.

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct RmsNorm {
  Tensor x, w;
  double eps = 1e-5;
  Tensor y, rstd;
};
struct RmsNormBackward {
  Tensor x, w, rstd, dy;
  Tensor dx, dw;
};
void run(const RmsNorm& op);
void run(const RmsNormBackward& op);

}  // namespace lightmoe
