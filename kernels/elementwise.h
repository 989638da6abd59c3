#pragma once
// Element by element, any shape; f32/bf16/f64, computed in f32 (f64). All write '=' unless said; every output may be an input.
//   Add            y = a + b
//   Axpy           y += alpha x        (x may be of another floating type than y)
//   Scale          y = alpha x
//   Clamp          y = min(max(x, -limit), limit)                            Hugging Face clip_qkv
//   ClampBackward  dx = dy where -limit <= x <= limit, else 0                 (torch.clamp: the boundary passes)
//   Blend          y = beta a + (1 - beta) b      annealing, arXiv 2603.12645 eq. 8: beta W_n + (1-beta) W_share; computed as b + beta (a - b)
//                  when 0 < beta < 1, exactly a at beta 1 and exactly b at beta 0; a, b, y may each be f32 or bf16.
//   Silu           y = x / (1 + e^-x)
//   SiluBackward   dx = dy (s + x s (1 - s)),  s = 1 / (1 + e^-x)
// Deterministic.

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct Add {
  Tensor a, b, y;
};
struct Axpy {
  double alpha = 1;
  Tensor x, y;
};
struct Scale {
  double alpha = 1;
  Tensor x, y;
};
struct Clamp {
  double limit = 0;
  Tensor x, y;
};
struct ClampBackward {
  double limit = 0;
  Tensor x, dy, dx;
};
struct Blend {
  double beta = 0;
  Tensor a, b, y;
};
struct Silu {
  Tensor x, y;
};
struct SiluBackward {
  Tensor x, dy, dx;
};
void run(const Add& op);
void run(const Axpy& op);
void run(const Scale& op);
void run(const Clamp& op);
void run(const ClampBackward& op);
void run(const Blend& op);
void run(const Silu& op);
void run(const SiluBackward& op);

}  // namespace lightmoe
