#include "model/moe_latent.h"

#include "kernels/combine.h"
#include "kernels/indexing.h"

namespace lightmoe {

LatentTerms::LatentTerms(const MoeLayer& layer, const Tensor& slots, const DispatchPlan& pairs, GemmCompute compute)
    : projections_(layer), compute_(compute), size_(projections_.size()) {
  if (layer.latents.empty()) return;
  std::vector<int32_t> group_of_slot;
  for (const Slot& slot : layer.slots) {
    group_of_slot.push_back(slot.kind == SlotKind::kLatent ? projections_.group_of(slot.latent) : -1);
  }
  group_of_slot.push_back(-1);
  plan_ = make_dispatch_plan(slots, group_of_slot, projections_.num_groups());
  for (const int32_t slot : plan_.slot_order) {
    latents_.push_back(layer.latents[static_cast<size_t>(layer.slots[static_cast<size_t>(slot)].latent)]);
  }
  pair_of_ = Tensor::empty({plan_.num_pairs}, DType::kI32);
  const Tensor pair_of_choice = pairs.index_pair.reshape({pairs.index_pair.numel()});
  run(Lookup{.table = pair_of_choice, .index = plan_.pair_index, .y = pair_of_});
}

std::vector<Tensor> LatentTerms::factors(ParameterPtr Latent::*member) const {
  std::vector<Tensor> list;
  for (const Latent& latent : latents_) list.push_back((latent.*member)->value);
  return list;
}

void LatentTerms::add_to_h(const Tensor& x, const Tensor& h) {
  const int64_t width = h.dim(1) / 2;
  u_ = Tensor::empty({plan_.num_visits, 2 * size_}, x.dtype());
  projections_.use(ExpertHalf::kGateUp, plan_, x.dtype(), false, [&](const LatentProjections::Block& block) {
    run(GroupedGemmM{.a = x,
                     .a_rows = plan_.visit_token,
                     .offsets = plan_.group_offsets,
                     .b = block.p,
                     .c = u_,
                     .trans_b = true,
                     .compute = compute_,
                     .c_column = block.first});
  });
  const Tensor rows = Tensor::empty({plan_.num_pairs, 2 * width}, h.dtype());
  GroupedGemmM op{.a = u_,
                  .a_rows = plan_.pair_visit,
                  .offsets = plan_.slot_offsets,
                  .b = factors(&Latent::a_gate),
                  .c = rows,
                  .trans_b = true,
                  .compute = compute_};
  run(op);
  op.b = factors(&Latent::a_up), op.a_column = size_, op.c_column = width;
  run(op);
  // Rows of h that belong to latent slots hold zeros until here: each takes its row.
  run(ScatterRows{.x = rows, .index = pair_of_, .y = h});
}

Tensor LatentTerms::down_rows(const Tensor& a) const {
  const Tensor w = Tensor::empty({plan_.num_pairs, size_}, a.dtype());
  run(GroupedGemmM{.a = a,
                   .a_rows = pair_of_,
                   .offsets = plan_.slot_offsets,
                   .b = factors(&Latent::a_down),
                   .c = w,
                   .compute = compute_});
  return w;
}

Tensor LatentTerms::gated_sum(const Tensor& rows, const Tensor& gates) const {
  const Tensor t = Tensor::empty({plan_.num_visits, size_}, rows.dtype());
  run(GatedSum{.a = rows, .gates = gates, .pair_index = plan_.pair_index, .pair_visit = plan_.pair_visit, .s = t});
  return t;
}

// to[token, :] += P^T rows, summed over the token's visits.
void LatentTerms::add_rows(ExpertHalf half, const Tensor& rows, const Tensor& to) const {
  const Tensor out = Tensor::empty({plan_.num_visits, to.dim(1)}, rows.dtype());
  projections_.use(half, plan_, rows.dtype(), false, [&](const LatentProjections::Block& block) {
    run(GroupedGemmM{.a = rows,
                     .offsets = plan_.group_offsets,
                     .b = block.p,
                     .c = out,
                     .beta = block.first == 0 ? 0.0 : 1.0,
                     .compute = compute_,
                     .a_column = block.first});
  });
  run(Combine{.x = out, .index = plan_.token_visit, .accumulate = true, .y = to});
}

void LatentTerms::add_to_y(const Tensor& a, const Tensor& gates, const Tensor& y) const {
  add_rows(ExpertHalf::kDown, gated_sum(down_rows(a), gates), y);
}

void LatentTerms::add_factor_gradient(ParameterPtr Latent::*member, GroupedGemmK op) const {
  std::vector<ParameterPtr> trained(latents_.size());
  for (size_t i = 0; i < latents_.size(); ++i) {
    if (const ParameterPtr& p = latents_[i].*member; p->trainable) trained[i] = p;
  }
  op.beta = grad_beta_of(trained), op.compute = compute_;
  for (const ParameterPtr& p : trained) op.c.push_back(p != nullptr ? p->grad : Tensor());
  run(op);
}

void LatentTerms::down_backward(const Tensor& a, const Tensor& dy, const Tensor& gates, const Tensor& da,
                                const Tensor& dgates) const {
  const Tensor w = down_rows(a), t = gated_sum(w, gates), dt = Tensor::empty(t.shape(), t.dtype());
  projections_.use(ExpertHalf::kDown, plan_, a.dtype(), true, [&](const LatentProjections::Block& block) {
    run(GroupedGemmM{.a = dy,
                     .a_rows = plan_.visit_token,
                     .offsets = plan_.group_offsets,
                     .b = block.p,
                     .c = dt,
                     .trans_b = true,
                     .compute = compute_,
                     .c_column = block.first});
    if (block.dp.empty()) return;
    run(GroupedGemmK{.a = t,
                     .b = dy,
                     .b_rows = plan_.visit_token,
                     .offsets = plan_.group_offsets,
                     .c = block.dp,
                     .beta = block.beta,
                     .compute = compute_,
                     .a_column = block.first});
  });
  const Tensor dw = Tensor::empty(w.shape(), w.dtype());
  run(GatedSumBackward{.a = w,
                       .ds = dt,
                       .gates = gates,
                       .pair_index = plan_.pair_index,
                       .pair_visit = plan_.pair_visit,
                       .da = dw,
                       .dgates = dgates});
  add_factor_gradient(&Latent::a_down, {.a = a, .a_rows = pair_of_, .b = dw, .offsets = plan_.slot_offsets});
  const Tensor rows = Tensor::empty({plan_.num_pairs, da.dim(1)}, da.dtype());
  run(GroupedGemmM{.a = dw,
                   .offsets = plan_.slot_offsets,
                   .b = factors(&Latent::a_down),
                   .c = rows,
                   .trans_b = true,
                   .compute = compute_});
  run(ScatterRows{.x = rows, .index = pair_of_, .y = da});
}

void LatentTerms::backward(const Tensor& x, const Tensor& dh, const Tensor& dx) const {
  const int64_t width = dh.dim(1) / 2;
  const GroupedGemmK by_slot{
      .a = dh, .a_rows = pair_of_, .b = u_, .b_rows = plan_.pair_visit, .offsets = plan_.slot_offsets};
  GroupedGemmK gradient = by_slot;
  add_factor_gradient(&Latent::a_gate, gradient);
  gradient.a_column = width, gradient.b_column = size_;
  add_factor_gradient(&Latent::a_up, gradient);

  const Tensor du_pairs = Tensor::empty({plan_.num_pairs, 2 * size_}, dh.dtype());
  GroupedGemmM op{.a = dh,
                  .a_rows = pair_of_,
                  .offsets = plan_.slot_offsets,
                  .b = factors(&Latent::a_gate),
                  .c = du_pairs,
                  .compute = compute_};
  run(op);
  op.b = factors(&Latent::a_up), op.a_column = width, op.c_column = size_;
  run(op);
  const Tensor du = Tensor::empty({plan_.num_visits, 2 * size_}, dh.dtype());
  run(SumPairs{.x = du_pairs, .pair_visit = plan_.pair_visit, .y = du});
  if (projections_.any_trainable(ExpertHalf::kGateUp)) {
    projections_.use(ExpertHalf::kGateUp, plan_, dh.dtype(), true, [&](const LatentProjections::Block& block) {
      run(GroupedGemmK{.a = du,
                       .b = x,
                       .b_rows = plan_.visit_token,
                       .offsets = plan_.group_offsets,
                       .c = block.dp,
                       .beta = block.beta,
                       .compute = compute_,
                       .a_column = block.first});
    });
  }
  if (dx.defined()) add_rows(ExpertHalf::kGateUp, du, dx);
}

}  // namespace lightmoe
