#pragma once
// The latent slots of one MoE layer (struct Latent in model/moe.h), over their own pairs p (slot s(p), gate g_p) and visits v, one per
// distinct (token, projection):
//   u_v = [P_gate | P_up] x_t           h_p = [A_gate u_v' | A_up u_v'']
//   t_v = sum_p g_p A_down^T a_p        y_t += P_down^T t_v                     where the down matrix is a factor too
//   backward: dt_v = P_down dy_t;  dw_p = g_p dt_v;  da_p = A_down dw_p;  dg_p = <dt_v, A_down^T a_p>;  dA_down += a_p dw_p^T;
//             dP_down += t_v dy_t^T;  dA += dh u^T;  du_v = sum_p [A_gate^T dh_p' | A_up^T dh_p''];  dP += du x^T;  dx += P^T du
// Where P comes from and what becomes of dP: model/latent_projections.h. u [V,2M] is kept between forward and backward.

#include "kernels/dispatch_plan.h"
#include "kernels/gemm.h"
#include "model/latent_projections.h"

namespace lightmoe {

class LatentTerms {
 public:
  // slots i32 [T,K] with values in [0, E], E = dropped; `pairs` is the plan whose pairs h and a are ordered by.
  LatentTerms(const MoeLayer& layer, const Tensor& slots, const DispatchPlan& pairs, GemmCompute compute);
  bool any() const { return plan_.num_pairs > 0; }
  bool any_down() const { return any() && latents_.front().a_down != nullptr; }
  // Writes the rows of h that are latents'.
  void add_to_h(const Tensor& x, const Tensor& h);
  void add_to_y(const Tensor& a, const Tensor& gates, const Tensor& y) const;
  // Writes the rows of da that are latents' and their entries of dgates.
  void down_backward(const Tensor& a, const Tensor& dy, const Tensor& gates, const Tensor& da,
                     const Tensor& dgates) const;
  // dx (may be undefined) += ...
  void backward(const Tensor& x, const Tensor& dh, const Tensor& dx) const;

 private:
  Tensor down_rows(const Tensor& a) const;  // A_down^T a_p
  Tensor gated_sum(const Tensor& rows, const Tensor& gates) const;
  void add_rows(ExpertHalf half, const Tensor& rows, const Tensor& to) const;
  std::vector<Tensor> factors(ParameterPtr Latent::*member) const;
  void add_factor_gradient(ParameterPtr Latent::*member, GroupedGemmK op) const;

  LatentProjections projections_;
  std::vector<Latent> latents_;  // in plan_.slot_order
  DispatchPlan plan_;            // groups are those of the projections
  Tensor pair_of_;               // row of h of each of its pairs
  GemmCompute compute_ = GemmCompute::kF32;
  int64_t size_ = 0;  // M
  Tensor u_;          // [V,2M]
};

}  // namespace lightmoe
