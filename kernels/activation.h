#pragma once
// Functions of single elements and their backward; beside kernels/elementwise.h, which has SiLU.
//   gelu      x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2                       (the exact form, torch.nn.GELU's default)
//   tanh, sigmoid
//   open      1 where x > 1/2, else 0;  is_zero  1 where x = 0, else 0           (backward: 0)
//   abs, sqrt                                                                  (backward at 0: 0)
// Activate: y = f(x).  ActivateBackward: dx = f'(x) dy.  '='; y may be x, dx may be x or dy.
// dtypes: f32/bf16/f64, one type; computed in f64 on the CPU, in f32 on a GPU. Deterministic.

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

enum class Activation : uint8_t { kGelu, kTanh, kSigmoid, kOpen, kIsZero, kAbs, kSqrt };

struct Activate {
  Activation kind = Activation::kGelu;
  Tensor x, y;
};
struct ActivateBackward {
  Activation kind = Activation::kGelu;
  Tensor x, dy, dx;
};
void run(const Activate& op);
void run(const ActivateBackward& op);

}  // namespace lightmoe
