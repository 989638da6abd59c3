#include "model/moe_low_rank.h"

#include <map>
#include <numeric>

#include "kernels/combine.h"

namespace lightmoe {
namespace {

// Pair p as a visit of its own: the gated sums then work pair by pair.
Tensor identity(int64_t count) {
  std::vector<int32_t> values(static_cast<size_t>(count));
  std::iota(values.begin(), values.end(), 0);
  return Tensor::from(values, {count});
}

}  // namespace

std::vector<LowRankTerms> LowRankTerms::of(const MoeLayer& layer, const std::vector<int32_t>& adapter_of_slot,
                                           const DispatchPlan& plan, GemmCompute compute) {
  std::map<int64_t, LowRankTerms> by_rank;
  std::map<int64_t, size_t> slots;
  for (size_t i = 0; i < plan.slot_order.size(); ++i) {
    const int32_t index = adapter_of_slot[static_cast<size_t>(plan.slot_order[i])];
    if (index < 0) continue;
    const Adapter& adapter = layer.adapters[static_cast<size_t>(index)];
    LowRankTerms& terms = by_rank[adapter.rank()];
    terms.adapters_.resize(plan.slot_order.size());
    terms.adapters_[i] = adapter;
    ++slots[adapter.rank()];
  }
  std::vector<LowRankTerms> all;
  for (auto& [rank, terms] : by_rank) {
    terms.rank_ = rank;
    terms.compute_ = compute;
    terms.covers_all_ = slots[rank] == plan.slot_order.size();
    all.push_back(std::move(terms));
  }
  return all;
}

std::vector<Tensor> LowRankTerms::values(Member member) const {
  std::vector<Tensor> list(adapters_.size());
  for (size_t i = 0; i < adapters_.size(); ++i) {
    if (const ParameterPtr& p = adapters_[i].*member; p != nullptr) list[i] = p->value;
  }
  return list;
}

void LowRankTerms::add_weight_gradient(Member member, GroupedGemmK op) const {
  std::vector<ParameterPtr> trained(adapters_.size());
  for (size_t i = 0; i < adapters_.size(); ++i) {
    if (const ParameterPtr& p = adapters_[i].*member; p != nullptr && p->trainable) trained[i] = p;
  }
  op.beta = grad_beta_of(trained);
  op.compute = compute_;
  for (const ParameterPtr& p : trained) op.c.push_back(p != nullptr ? p->grad : Tensor());
  run(op);
}

Tensor LowRankTerms::rows(const DispatchPlan& plan, int64_t width, DType dtype) const {
  const Shape shape{plan.num_pairs, width};
  return covers_all_ ? Tensor::empty(shape, dtype) : Tensor::zeros(shape, dtype);
}

void LowRankTerms::add_to_h(const DispatchPlan& plan, const Tensor& x, const Tensor& h) {
  const int64_t width = h.dim(1) / 2;
  u_ = rows(plan, 2 * rank_, x.dtype());
  run(GroupedGemmM{.a = x,
                   .a_rows = plan.pair_token,
                   .offsets = plan.slot_offsets,
                   .b = values(&Adapter::a_gate_up),
                   .c = u_,
                   .trans_b = true,
                   .compute = compute_});
  GroupedGemmM op{.a = u_,
                  .offsets = plan.slot_offsets,
                  .b = values(&Adapter::b_gate),
                  .c = h,
                  .trans_b = true,
                  .beta = 1,
                  .compute = compute_};
  run(op);
  op.b = values(&Adapter::b_up), op.a_column = rank_, op.c_column = width;
  run(op);
}

void LowRankTerms::add_to_y(const DispatchPlan& plan, const Tensor& a, const Tensor& gates, const Tensor& y_pairs,
                            double beta) {
  w_ = rows(plan, rank_, a.dtype());
  run(GroupedGemmM{.a = a,
                   .offsets = plan.slot_offsets,
                   .b = values(&Adapter::a_down),
                   .c = w_,
                   .trans_b = true,
                   .compute = compute_});
  const Tensor gated = Tensor::empty(w_.shape(), w_.dtype());
  run(GatedSum{
      .a = w_, .gates = gates, .pair_index = plan.pair_index, .pair_visit = identity(plan.num_pairs), .s = gated});
  run(GroupedGemmM{.a = gated,
                   .offsets = plan.slot_offsets,
                   .b = values(&Adapter::b_down),
                   .c = y_pairs,
                   .trans_b = true,
                   .beta = beta,
                   .compute = compute_});
}

void LowRankTerms::down_backward(const DispatchPlan& plan, const Tensor& dy, const Tensor& a, const Tensor& gates,
                                 const Tensor& da, const Tensor& dgates) const {
  const Tensor e = rows(plan, rank_, dy.dtype());
  run(GroupedGemmM{.a = dy,
                   .a_rows = plan.pair_token,
                   .offsets = plan.slot_offsets,
                   .b = values(&Adapter::b_down),
                   .c = e,
                   .compute = compute_});
  const Tensor every_pair = identity(plan.num_pairs);
  const Tensor gated = Tensor::empty(w_.shape(), w_.dtype());
  run(GatedSum{.a = w_, .gates = gates, .pair_index = plan.pair_index, .pair_visit = every_pair, .s = gated});
  add_weight_gradient(&Adapter::b_down, {.a = dy, .a_rows = plan.pair_token, .b = gated, .offsets = plan.slot_offsets});
  // g e over the gated w, which is no longer needed
  run(GatedSumBackward{.a = w_,
                       .ds = e,
                       .gates = gates,
                       .pair_index = plan.pair_index,
                       .pair_visit = every_pair,
                       .accumulate_dgates = true,
                       .da = gated,
                       .dgates = dgates});
  add_weight_gradient(&Adapter::a_down, {.a = gated, .b = a, .offsets = plan.slot_offsets});
  run(GroupedGemmM{.a = gated,
                   .offsets = plan.slot_offsets,
                   .b = values(&Adapter::a_down),
                   .c = da,
                   .beta = 1,
                   .compute = compute_});
}

void LowRankTerms::gate_up_backward(const DispatchPlan& plan, const Tensor& dh, const Tensor& x, const Tensor& dx_pairs,
                                    double beta) const {
  const int64_t width = dh.dim(1) / 2;
  const Tensor& offsets = plan.slot_offsets;
  add_weight_gradient(&Adapter::b_gate, {.a = dh, .b = u_, .offsets = offsets});
  add_weight_gradient(&Adapter::b_up, {.a = dh, .b = u_, .offsets = offsets, .a_column = width, .b_column = rank_});
  const Tensor du = rows(plan, 2 * rank_, dh.dtype());
  GroupedGemmM op{.a = dh, .offsets = offsets, .b = values(&Adapter::b_gate), .c = du, .compute = compute_};
  run(op);
  op.b = values(&Adapter::b_up), op.a_column = width, op.c_column = rank_;
  run(op);
  add_weight_gradient(&Adapter::a_gate_up, {.a = du, .b = x, .b_rows = plan.pair_token, .offsets = offsets});
  if (!dx_pairs.defined()) return;
  run(GroupedGemmM{
      .a = du, .offsets = offsets, .b = values(&Adapter::a_gate_up), .c = dx_pairs, .beta = beta, .compute = compute_});
}

}  // namespace lightmoe
