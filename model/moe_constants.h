#pragma once
// The constant slots of one MoE layer:  y_t += sum_k g_tk c(s_tk)  over the chosen slots that are constants.
//   backward: dg_tk += <dy_t, c>;  dC_c += sum g_tk dy_t;  x takes no part.
// Constants are never evaluated as experts: a token that chose only constants costs K additions of D numbers.

#include "kernels/dispatch_plan.h"
#include "model/moe.h"

namespace lightmoe {

class ConstantTerms {
 public:
  // slots i32 [T,K] with values in [0, E], E = dropped.
  ConstantTerms(const MoeLayer& layer, const Tensor& slots);
  bool any() const { return plan_.num_pairs > 0; }
  void add_to_y(const Tensor& gates, const Tensor& y) const;
  // dgates: the entries of constant slots are written.
  void backward(const Tensor& dy, const Tensor& gates, const Tensor& dgates) const;

 private:
  Tensor rows_as(DType dtype) const;
  ParameterPtr table_;  // [C,D]
  DispatchPlan plan_;   // groups are constants
  Tensor constant_;     // [T,K] of each choice, -1 = none
  Tensor constant_of_pair_;
};

}  // namespace lightmoe
