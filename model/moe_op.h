#pragma once
// Forward and backward of the experts of one MoE layer on its slot table (equations in model/moe.h), differentiable.
//   y[t] = sum_k gates[t,k] f_{slots[t,k]}(x[t])
// x, y [T,D] f32 or f64; slots i32 [T,K]; gates [T,K]. A slot that was masked (removed) is never in `slots`.
// Kept for backward: x (rebuilt from the norm before it), gates, the plan, h [P,2F] after its low-rank terms and what is R wide; SwiGLU is recomputed from h.
// Frozen experts get no weight product. The layer must not change between forward and backward.

#include "autograd/ops.h"
#include "model/moe.h"

namespace lightmoe {

Var moe_experts(Tape& tape, const Var& x, const MoeLayer& layer, const Tensor& slots, const Var& gates,
                GemmCompute compute);

// u8 [E], 1 = removed; undefined when no slot is.
Tensor removed_mask(const MoeLayer& layer);

}  // namespace lightmoe
