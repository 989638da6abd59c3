#include "model/moe_op.h"

#include <optional>

#include "kernels/combine.h"
#include "kernels/swiglu.h"
#include "model/moe_fused.h"
#include "model/moe_latent.h"
#include "model/moe_low_rank.h"
#include "model/moe_pass.h"
#include "model/moe_widths.h"
#include "runtime/trace.h"

namespace lightmoe {
namespace {

class MoeRun : private MoePass {
 public:
  MoeRun(const MoeLayer& layer, GemmCompute compute, const Tensor& x, const Tensor& slots, const Tensor& gates,
         const DispatchPlan* plan)
      : MoePass(layer, compute, x.dtype(), slots, gates, plan), x_(x), hidden_(x.dim(1)) {
    if (pairs_are_visits()) bound_pairs_by_visits();
    low_rank_ = LowRankTerms::of(layer, groups_.adapter_of_slot, plan_, compute);
    latents_.emplace(layer, chosen_, plan_, compute);
  }

  // Adds to `sum`, or gives a tensor of its own where that is undefined.
  Tensor forward(bool keep, const Tensor& sum);
  // Whether backward reads x.
  bool reads_x() const { return !low_rank_.empty() || latents_->any() || any_trainable(groups_, ExpertHalf::kGateUp); }
  // dx undefined: x needs no gradient. Returns the gradient of the gates.
  Tensor backward(const Tensor& x, const Tensor& dy, const Tensor& dx, bool accumulate_dx);

 private:
  bool pairs_are_visits() const { return !groups_.shared; }
  // On devices the counts are bounds (kernels/dispatch_plan.h), and that of the visits may be the closer one.
  void bound_pairs_by_visits() {
    if (plan_.num_pairs == plan_.num_visits) return;
    for (Tensor* list : {&plan_.pair_token, &plan_.pair_index, &plan_.pair_visit}) {
      *list = list->slice(0, plan_.num_visits);
    }
    plan_.num_pairs = plan_.num_visits;
  }
  Tensor gated_sum(const Tensor& a) const {
    const Tensor s = empty(plan_.num_visits, width_);
    run(GatedSum{.a = a, .gates = gates_, .pair_index = plan_.pair_index, .pair_visit = plan_.pair_visit, .s = s});
    return s;
  }
  // y = sum over the token's visits of rows, which the adapters' terms may join: add(rows [P,D], beta).
  template <class AddTerms>
  void combine(const Tensor& rows, const Tensor& y, bool accumulate, AddTerms&& add) const;

  Tensor x_;  // gone after forward
  std::vector<LowRankTerms> low_rank_;
  std::optional<LatentTerms> latents_;
  int64_t hidden_ = 0;
  Tensor h_;  // [P,2F]
};

template <class AddTerms>
void MoeRun::combine(const Tensor& rows, const Tensor& y, bool accumulate, AddTerms&& add) const {
  if (pairs_are_visits()) {
    for (size_t i = 0; i < low_rank_.size(); ++i) add(i, rows, 1.0);
  }
  run(Combine{.x = rows, .index = plan_.token_visit, .accumulate = accumulate, .y = y});
  if (pairs_are_visits() || low_rank_.empty()) return;
  const bool whole = low_rank_.size() == 1 && low_rank_[0].covers_all_pairs();
  const Tensor terms = whole ? empty(plan_.num_pairs, hidden_) : Tensor::zeros({plan_.num_pairs, hidden_}, dtype_);
  for (size_t i = 0; i < low_rank_.size(); ++i) add(i, terms, whole ? 0.0 : 1.0);
  run(Combine{.x = terms, .index = plan_.index_pair, .accumulate = true, .y = y});
}

Tensor MoeRun::forward(bool keep, const Tensor& sum) {
  const TraceRange trace(TraceLevel::kOp, "moe.experts", plan_.num_pairs);
  Tensor h = visit_rows(2 * width_);
  visit_product(x_, plan_.visit_token, ExpertHalf::kGateUp, true, h);
  if (!pairs_are_visits()) {
    const Tensor h0 = std::exchange(h, empty(plan_.num_pairs, 2 * width_));
    run(ExpandPairs{.x = h0, .pair_visit = plan_.pair_visit, .y = h});
  }
  if (latents_->any()) latents_->add_to_h(x_, h);
  for (LowRankTerms& terms : low_rank_) terms.add_to_h(plan_, x_, h);
  Tensor a = empty(plan_.num_pairs, width_);
  run(SwiGlu{.h = h, .a = a});
  if (keep) h_ = h;
  h.reset();

  const bool accumulate = sum.defined();
  const Tensor y = accumulate ? sum : empty(x_.dim(0), hidden_), rows = visit_rows(hidden_);
  x_.reset();
  if (pairs_are_visits() && low_rank_.empty()) {  // the gate may wait until the rows are summed
    visit_product(a, {}, ExpertHalf::kDown, true, rows);
    run(Combine{.x = rows, .index = plan_.index_pair, .scales = gates_, .accumulate = accumulate, .y = y});
    if (latents_->any_down()) latents_->add_to_y(a, gates_, y);
    if (constants_->any()) constants_->add_to_y(gates_, y);
    return y;
  }
  visit_product(gated_sum(a), {}, ExpertHalf::kDown, true, rows);
  combine(rows, y, accumulate, [&](size_t i, const Tensor& pair_rows, double beta) {
    low_rank_[i].add_to_y(plan_, a, gates_, pair_rows, beta);
  });
  if (latents_->any_down()) latents_->add_to_y(a, gates_, y);
  if (constants_->any()) constants_->add_to_y(gates_, y);
  return y;
}

Tensor MoeRun::backward(const Tensor& x, const Tensor& dy, const Tensor& dx, bool accumulate_dx) {
  const TraceRange trace(TraceLevel::kOp, "moe.experts.backward", plan_.num_pairs);
  const Tensor dgates = Tensor::zeros(gates_.shape(), gates_.dtype());
  Tensor a = empty(plan_.num_pairs, width_), da = empty(plan_.num_pairs, width_);
  run(SwiGlu{.h = h_, .a = a});
  {
    const Tensor ds = visit_rows(width_);
    visit_product(dy, plan_.visit_token, ExpertHalf::kDown, false, ds);
    run(GatedSumBackward{.a = a,
                         .ds = ds,
                         .gates = gates_,
                         .pair_index = plan_.pair_index,
                         .pair_visit = plan_.pair_visit,
                         .da = da,
                         .dgates = dgates});
  }
  if (constants_->any()) constants_->backward(dy, gates_, dgates);
  if (latents_->any_down()) latents_->down_backward(a, dy, gates_, da, dgates);
  if (any_trainable(groups_, ExpertHalf::kDown)) {
    weight_gradient(ExpertHalf::kDown, {.a = dy, .a_rows = plan_.visit_token, .b = gated_sum(a)});
  }
  for (const LowRankTerms& terms : low_rank_) terms.down_backward(plan_, dy, a, gates_, da, dgates);
  if (!dx.defined() && !reads_x()) return unmerged(dgates);

  a.reset();
  const Tensor dh = h_;  // dh takes the place of h
  run(SwiGluBackward{.h = h_, .da = da, .dh = dh});
  da.reset();
  Tensor dh0 = dh;
  if (!pairs_are_visits()) {
    dh0 = empty(plan_.num_visits, 2 * width_);
    run(SumPairs{.x = dh, .pair_visit = plan_.pair_visit, .y = dh0});
  }
  if (any_trainable(groups_, ExpertHalf::kGateUp)) {
    weight_gradient(ExpertHalf::kGateUp, {.a = dh0, .b = x, .b_rows = plan_.visit_token});
  }
  if (!dx.defined()) {
    for (const LowRankTerms& terms : low_rank_) terms.gate_up_backward(plan_, dh, x, {}, 0);
    if (latents_->any()) latents_->backward(x, dh, {});
    return unmerged(dgates);
  }
  const Tensor rows = visit_rows(hidden_);
  visit_product(dh0, {}, ExpertHalf::kGateUp, false, rows);
  combine(rows, dx, accumulate_dx, [&](size_t i, const Tensor& pair_rows, double beta) {
    low_rank_[i].gate_up_backward(plan_, dh, x, pair_rows, beta);
  });
  if (latents_->any()) latents_->backward(x, dh, dx);
  return unmerged(dgates);
}

}  // namespace

Var moe_experts(Tape& tape, const Var& x, const MoeLayer& layer, const Tensor& slots, const Var& gates,
                GemmCompute compute, const DispatchPlan* plan) {
  const MoeFusion fused = moe_execution().fused;
  const bool wanted = fused == MoeFusion::kOn || (fused == MoeFusion::kAutomatic && slots.device() != DeviceKind::kCpu);
  if (wanted && takes_fused(layer, slots.device())) {
    return moe_experts_fused(tape, x, layer, slots, gates, compute, plan);
  }
  const bool needs = x.needs_grad() || gates.needs_grad() || any_trainable(layer);
  const bool keep = tape.recording() && needs;
  std::vector<std::shared_ptr<MoeRun>> passes;
  Tensor sum;
  bool reads_x = false;
  const auto add = [&](const MoeLayer& part, const DispatchPlan* own_plan) {
    const auto pass = std::make_shared<MoeRun>(part, compute, x.value, slots, gates.value, own_plan);
    sum = pass->forward(keep, sum);
    reads_x = reads_x || pass->reads_x();
    if (keep) passes.push_back(pass);
  };
  if (has_one_width(layer)) {
    add(layer, plan);
  } else {
    for (const MoeLayer& part : split_by_width(layer, slots)) add(part, nullptr);
  }
  const Var y = Tape::output(sum, needs);
  if (!keep) return y;
  tape.record(y, [passes, x = reads_x ? Saved(x) : Saved(), dx = x.grad, dgates = gates.grad](const Tensor& dy) {
    bool accumulate = false;
    const Tensor target = dx ? dx->target(dy.shape(), dy.dtype(), &accumulate) : Tensor();
    for (const std::shared_ptr<MoeRun>& pass : passes) {
      const Tensor d = pass->backward(x.get(), dy, target, accumulate);
      if (dgates) dgates->add(d);
      accumulate = true;
    }
  });
  return y;
}

Tensor removed_mask(const MoeLayer& layer) {
  std::vector<uint8_t> mask;
  bool any = false;
  for (const Slot& slot : layer.slots) {
    mask.push_back(slot.kind == SlotKind::kRemoved);
    any = any || mask.back() != 0;
  }
  return any ? Tensor::from(mask, {layer.num_slots()}) : Tensor();
}

}  // namespace lightmoe
