#pragma once
// The adapters of one rank R in one MoE layer, over its pairs p (token t(p), slot s(p), gate g_p):
//   u_p = [A_gate | A_up] x_t,  h_p += [B_gate u_p' | B_up u_p'']      w_p = A_down a_p,  y_p += B_down (g_p w_p)
//   backward: e_p = B_down^T dy_t;  da_p += g_p A_down^T e_p;  dg_p += <e_p, w_p>;  dB_down += dy_t (g_p w_p)^T;  dA_down += (g_p e_p) a_p^T
//             du_p = [B_gate^T dh_p' | B_up^T dh_p''];  dx_p += [A_gate | A_up]^T du_p;  dA, dB likewise
// Pairs of slots without an adapter of this rank take no part. Everything R wide is kept between forward and backward.

#include <vector>

#include "kernels/dispatch_plan.h"
#include "kernels/gemm.h"
#include "model/moe.h"

namespace lightmoe {

class LowRankTerms {
 public:
  // One object per rank that occurs among the slots of the plan.
  static std::vector<LowRankTerms> of(const MoeLayer& layer, const std::vector<int32_t>& adapter_of_slot,
                                      const DispatchPlan& plan, GemmCompute compute);

  bool covers_all_pairs() const { return covers_all_; }
  void add_to_h(const DispatchPlan& plan, const Tensor& x, const Tensor& h);
  // y_pairs [P,D] = beta y_pairs + ...; beta 0 leaves the rows of pairs without adapter unwritten.
  void add_to_y(const DispatchPlan& plan, const Tensor& a, const Tensor& gates, const Tensor& y_pairs, double beta);
  void down_backward(const DispatchPlan& plan, const Tensor& dy, const Tensor& a, const Tensor& gates, const Tensor& da,
                     const Tensor& dgates) const;
  // dx_pairs may be undefined; beta as in add_to_y.
  void gate_up_backward(const DispatchPlan& plan, const Tensor& dh, const Tensor& x, const Tensor& dx_pairs,
                        double beta) const;

 private:
  using Member = ParameterPtr Adapter::*;
  std::vector<Tensor> values(Member member) const;
  void add_weight_gradient(Member member, GroupedGemmK op) const;
  Tensor rows(const DispatchPlan& plan, int64_t width, DType dtype) const;

  std::vector<Adapter> adapters_;  // in plan.slot_order; null members = none
  int64_t rank_ = 0;
  bool covers_all_ = false;
  GemmCompute compute_ = GemmCompute::kF32;
  Tensor u_, w_;  // [P,2R] [P,R]
};

}  // namespace lightmoe
