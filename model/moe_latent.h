#pragma once
// The latent slots of one MoE layer: gate and up of slot s are a private factor times a projection shared by a group,
//   W_gate = A_gate B_gate,  W_up = A_up B_up     A [F,M] of the slot, B [M,D] of the group; the down matrix is the slot's own
//   u = [B_gate | B_up] x   once per (token, projection);   h_s += [A_gate u' | A_up u'']
//   backward: dA += dh u^T;  du = sum over the token's slots of the group of [A_gate^T dh' | A_up^T dh''];  dB += du x^T;  dx += B^T du
// u [visits, 2M] is kept between forward and backward.

#include "kernels/dispatch_plan.h"
#include "kernels/gemm.h"
#include "model/moe.h"

namespace lightmoe {

class LatentTerms {
 public:
  // slots i32 [T,K] with values in [0, E], E = dropped; `pairs` is the plan whose pairs h is ordered by.
  LatentTerms(const MoeLayer& layer, const Tensor& slots, const DispatchPlan& pairs, GemmCompute compute);
  bool any() const { return plan_.num_pairs > 0; }
  void add_to_h(const Tensor& x, const Tensor& h);
  // dx (may be undefined) += ...
  void backward(const Tensor& x, const Tensor& dh, const Tensor& dx) const;

 private:
  std::vector<Tensor> factors(ParameterPtr Latent::*member) const;
  void add_factor_gradient(ParameterPtr Latent::*member, GroupedGemmK op) const;

  std::vector<ParameterPtr> projections_;  // [2M,D]
  std::vector<Latent> latents_;            // in plan_.slot_order
  DispatchPlan plan_;                      // groups are projections
  Tensor pair_of_;                         // row of h of each of its pairs
  GemmCompute compute_ = GemmCompute::kF32;
  int64_t size_ = 0;  // M
  Tensor u_;          // [V,2M]
};

}  // namespace lightmoe
