#pragma once
// A small linear map of each slot's own, on what a token's choices see:  y[t K + k, :] = W_s x_t + b_s,  s = slots[t,k];  0 for number E.
// x [T,D], slots i32 [T,K], w [E*N,D] (N rows a slot), b [E*N] or null. Differentiable; f32, bf16 or f64.

#include "autograd/ops.h"

namespace lightmoe {

Var slot_linear(Tape& tape, const Var& x, const Tensor& slots, const ParameterPtr& w, const ParameterPtr& b,
                int64_t num_slots);

}  // namespace lightmoe
