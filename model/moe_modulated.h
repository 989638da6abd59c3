#pragma once
// The chosen experts of a layer with their insides changed from token to token, differentiable; the plain definition:
//   h_p = [W_g xg_t | W_u xu_t],  a_p = SwiGLU(h_p),  y_t = sum over the token's choices p of g_p W_d (m_p * a_p)
// xg, xu [T,D]: what gate and up read;  m: a multiplier for blocks of N = F / blocks units, [T,B] (one for all choices of a token) or
// [T*K,B] (choice t K + k); undefined: 1. slots i32 [T,K], where number E gives nothing; gates [T,K]. f32, bf16 or f64.
// Every slot must have a stored expert of its own, all of one width (owns_its_experts, has_one_width). Nothing is saved where m is 0: units
// are computed and multiplied.

#include "autograd/ops.h"
#include "model/moe.h"

namespace lightmoe {

struct ModulatedExperts {
  Var x_gate, x_up;
  Tensor slots;
  Var gates;
  Var scale;  // m
};
Var modulated_experts(Tape& tape, const ModulatedExperts& in, const MoeLayer& layer, GemmCompute compute);

// a of every choice, [T*K,F]; zeros where slots is E.
Tensor unit_activations(const MoeLayer& layer, const Tensor& x, const Tensor& slots, GemmCompute compute);

}  // namespace lightmoe
