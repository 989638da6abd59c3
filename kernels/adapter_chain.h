#pragma once
// What lies between an MoE layer's gate/up and down products when slots share a base (model/moe.h, rule 1), in one pass that stores
// neither h, nor a, nor dh of a pair. For pair p of visit v, token t, slot s and gate g = gates[pair_index[p]]:
//   AdapterChain           h = h0[v] + [B_gate u_p' | B_up u_p''];  a = SwiGLU(h);  s[v] = sum_p g a;  w_p = g A_down a
//   AdapterChainBackward   the same h and a again;  c = ds[v] + A_down^T e_p;  dgates[pair_index[p]] = <c, a>;  da = g c;  dh by SwiGLU;
//                          dh0[v] = sum_p dh;  du_p = [B_gate^T dh' | B_up^T dh''];  s[v] as above if defined
//   AdapterGradients       dB_gate_s = beta dB_gate_s + sum_p dh' u_p'^T, dB_up_s likewise, dA_down_s = ... + sum_p e_p (g a)^T
//   LowRankCombine         y[t] (=|+=) sum_j rows[token_visit[t,j]] + sum_p M_s z_p      (M_s [D,K], or [K,D] when transposed)
// Slots without matrices (undefined entries) have h = h0[v] alone and no w, e, du, z. u' and u'' are columns [0, R) and [R, 2R) of u, R the
//   slot's own rank, at most kMaxAdapterRank; columns beyond a slot's own are neither read nor written.
// shapes: h0, dh0 [V,2F]; s, ds [V,F]; u, du [P,2 max R]; w, e [P, max R]; gates, dgates [T,K]; z [P, max K]; rows [V,D]; y [T,D];
//   V, P the plan's rows; b_gate, b_up [F,R], a_down [R,F], one entry for each of plan.slot_order.
// dtypes: rows of one type T, f32, bf16 or (cpu) f64; matrices of one type, f32, bf16 or T; gates, gradients and y f32 (f64); y may be T.
//   With T = bf16 every factor is rounded to bf16 (a before A_down, dh before B^T); sums in f32 (f64), s and dh0 rounded once.
// done [G] or empty: groups marked by 1 have no adapters, and nothing of them is computed: the products' epilogues have done it (gemm.h).
// writes: '=' (dgates: '=' where a pair names an entry); gradients by their beta. Rows of no visit or pair are not touched. Deterministic.
// FLOPs per pair: forward 6 F R, backward 12 F R, gradients 14 F R; combine 2 D K. Bytes: h0 once per pair, s once per visit.

#include <array>

#include "kernels/dispatch_plan.h"

namespace lightmoe {

inline constexpr int64_t kMaxAdapterRank = 64;
inline constexpr size_t kMaxChainSlots = 128;  // sim, cuda: positions of a plan, and groups

struct AdapterMatrices {
  std::vector<Tensor> b_gate, b_up, a_down;  // all three undefined where a slot has no adapter
  int64_t rank(size_t position) const { return b_gate[position].defined() ? b_gate[position].dim(1) : 0; }
};

struct AdapterChain {
  const DispatchPlan& plan;
  const AdapterMatrices& adapters;
  Tensor h0, u, gates;  // u undefined when no slot has an adapter
  Tensor s, w;          // w undefined with u
  std::vector<uint8_t> done = {};
};
struct AdapterChainBackward {
  const DispatchPlan& plan;
  const AdapterMatrices& adapters;
  Tensor h0, u, gates, ds, e;
  Tensor dh0, du, dgates, s;  // s may be undefined
  std::vector<uint8_t> done = {};
};
struct AdapterGradients {
  const DispatchPlan& plan;
  const AdapterMatrices& adapters;
  Tensor h0, u, gates, ds, e;
  AdapterMatrices gradients;     // undefined entries: not wanted
  std::array<double, 3> beta{};  // of b_gate, b_up, a_down
};
struct LowRankCombine {
  const DispatchPlan& plan;
  Tensor rows;                   // undefined: no rows to add
  Tensor z;                      // undefined: no low-rank terms
  std::vector<Tensor> matrices;  // per position, undefined where there is none
  bool transposed = false, accumulate = false;
  Tensor y;
};
void run(const AdapterChain& op);
void run(const AdapterChainBackward& op);
void run(const AdapterGradients& op);
void run(const LowRankCombine& op);

}  // namespace lightmoe
