#pragma once
// The experts of one MoE layer in few kernels (kernels/adapter_chain.h), the same function as model/moe_op.h's step-by-step form:
//   forward    h0 of every visit | u = A x of every pair | chain: w = g A_down a, s = sum g a | s W_d | y: rows of visits + B_down w
//   backward   ds = W_d^T dy of every visit | e = B_down^T dy of every pair | chain backward: dh0, du, dgates, s | weight gradients |
//              dh0 W_gu | dx: rows of visits + A^T du
// A group that has one lane without adapter (a kept expert) needs no chain: SwiGLU, the gate and their derivatives are epilogues of its
// products (kernels/gemm.h), so that ds is not stored, nor h0 where nothing is kept for backward.
// Of a pair only what is R wide is stored; h, a and dh are not. With bf16 products rows within the layer are bf16, sums f32.
// Kept for backward: x (rebuilt), gates, the plan, h0 [V,2F], u [P,2R], w [P,R].

#include "autograd/tape.h"
#include "kernels/dispatch_plan.h"
#include "kernels/gemm.h"
#include "model/moe.h"

namespace lightmoe {

// Layers of one expert width, without latent slots, with ranks up to kMaxAdapterRank, each adapter on one slot, adapters of one type.
bool takes_fused(const MoeLayer& layer, DeviceKind device);

Var moe_experts_fused(Tape& tape, const Var& x, const MoeLayer& layer, const Tensor& slots, const Var& gates,
                      GemmCompute compute, const DispatchPlan* plan);

}  // namespace lightmoe
