#pragma once
// What lies between the projections of queries and keys and their product, in one pass over each:
//   v = x rstd w, rstd = 1 / sqrt(mean(x^2) + eps), over the whole projection;  c = min(max(v, -limit), limit);
//   y = c rotated: for i < Hd/2 of each head, angle a = pos * theta^(-2i/Hd),
//     y[i] = c[i] cos a - c[i+Hd/2] sin a,   y[i+Hd/2] = c[i+Hd/2] cos a + c[i] sin a
//   Hugging Face modeling_olmoe.py OlmoeAttention: q_norm, k_norm, clip_qkv, apply_rotary_pos_emb (rotate-half form)
// backward: dc = dy rotated by -a;  dv = dc where -limit <= v <= limit, else 0;
//   dx = rstd (dv w - x rstd^2 mean(dv w x)),  dw += sum_t dv x rstd
// shapes: x, y, dy, dx [T,H*Hd], one H for q and one for k; w, dw [H*Hd]; rstd [T]; positions i32 [T], >= 0.
// dtypes: rows f32/bf16/f64 (one type); w of their type or f32, one type; rstd, dw f32 (f64); sums in f32 (f64), angles in f64, cos and
//   sin in f32 (f64). x rstd and v are rounded to x's type, as HF does.
// k may be empty (x undefined), rstd and dw undefined (not kept, not wanted). A row does not depend on the others.
// writes: y, rstd, dx with '='; dw with '+='.  aliasing: y may be x, dx may be dy.  Deterministic.
// moves 2 elements of rows each forward, 3 backward.

#include <limits>

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct HeadTurns {
  Tensor positions;
  int64_t head_dim = 0;
  double theta = 10000;
};
struct QkNormRope {
  struct Rows {
    Tensor x, w, y, rstd;
  };
  Rows q, k;
  HeadTurns turns;
  double eps = 1e-5, limit = std::numeric_limits<double>::infinity();
};
struct QkNormRopeBackward {
  struct Rows {
    Tensor x, w, rstd, dy, dx, dw;
  };
  Rows q, k;
  HeadTurns turns;
  double limit = std::numeric_limits<double>::infinity();
};
void run(const QkNormRope& op);
void run(const QkNormRopeBackward& op);

}  // namespace lightmoe
