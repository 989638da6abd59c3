#pragma once
// What both executions of one MoE layer's pass share (model/moe_op.cpp step by step, model/moe_fused.cpp in fused kernels): groups, plan,
// merged gates, the constants' terms, and products over the visits.

#include <optional>

#include "kernels/gemm.h"
#include "model/moe_constants.h"
#include "model/moe_groups.h"

namespace lightmoe {

// A grouped product whose matrices may be of two dtypes (bf16 weights beside f32 blends): one call for each.
void run_grouped(GroupedGemmM op);

class MoePass {
 protected:
  // rows: the type of activations within the pass. plan: of slots, or null.
  MoePass(const MoeLayer& layer, GemmCompute compute, DType rows, const Tensor& slots, const Tensor& gates,
          const DispatchPlan* plan);

  Tensor empty(int64_t rows, int64_t width) const { return Tensor::empty({rows, width}, dtype_); }
  // Rows that a grouped product over the visits writes; zero first where groups stand for W = 0 or experts for fewer units.
  Tensor visit_rows(int64_t width) const {
    return zero_rows_ || bank_width_ < width_ ? Tensor::zeros({plan_.num_visits, width}, dtype_)
                                              : empty(plan_.num_visits, width);
  }
  void visit_product(const Tensor& a, const Tensor& a_rows, ExpertHalf half, bool trans_b, const Tensor& c) const;
  // The same for the groups marked by `wanted` in `marks`.
  struct SomeGroups {
    const std::vector<uint8_t>& marks;
    uint8_t wanted;
  };
  void visit_product(GroupedGemmM op, ExpertHalf half, const SomeGroups& some) const;
  // op: a, b and their rows.
  void weight_gradient(ExpertHalf half, GroupedGemmK op) const;
  // Gradient of the gates the pass was given, from that of the merged ones.
  Tensor unmerged(const Tensor& dgates) const;

  MoeGroups groups_;
  GemmCompute compute_;
  DType dtype_;
  Tensor gates_, first_;  // gates after merging; first_ undefined when nothing merges
  Tensor chosen_;         // slots after merging
  DispatchPlan plan_;
  std::optional<ConstantTerms> constants_;
  int64_t width_ = 0, bank_width_ = 0;  // units of the slots, and of the stored experts where adapters are wider
  bool zero_rows_ = false;

 private:
  void merge(const Tensor& slots);
  void halves_product(GroupedGemmM op, const std::vector<Tensor>& weights) const;
};

}  // namespace lightmoe
