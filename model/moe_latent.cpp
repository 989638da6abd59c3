#include "model/moe_latent.h"

#include "kernels/combine.h"
#include "kernels/indexing.h"

namespace lightmoe {

LatentTerms::LatentTerms(const MoeLayer& layer, const Tensor& slots, const DispatchPlan& pairs, GemmCompute compute)
    : projections_(layer.projections), compute_(compute) {
  if (layer.latents.empty()) return;
  std::vector<int32_t> projection_of_slot;
  for (const Slot& slot : layer.slots) {
    const bool latent = slot.kind == SlotKind::kLatent;
    projection_of_slot.push_back(latent ? layer.latents[static_cast<size_t>(slot.latent)].projection : -1);
  }
  projection_of_slot.push_back(-1);
  plan_ = make_dispatch_plan(slots, projection_of_slot, static_cast<int64_t>(projections_.size()));
  size_ = layer.latents.front().a_gate->value.dim(1);
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
  std::vector<Tensor> shared;
  for (const ParameterPtr& p : projections_) shared.push_back(p->value);
  u_ = Tensor::empty({plan_.num_visits, 2 * size_}, x.dtype());
  run(GroupedGemmM{.a = x,
                   .a_rows = plan_.visit_token,
                   .offsets = plan_.group_offsets,
                   .b = shared,
                   .c = u_,
                   .trans_b = true,
                   .compute = compute_});
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

void LatentTerms::add_factor_gradient(ParameterPtr Latent::*member, GroupedGemmK op) const {
  std::vector<ParameterPtr> trained(latents_.size());
  for (size_t i = 0; i < latents_.size(); ++i) {
    if (const ParameterPtr& p = latents_[i].*member; p->trainable) trained[i] = p;
  }
  op.beta = grad_beta_of(trained), op.compute = compute_;
  for (const ParameterPtr& p : trained) op.c.push_back(p != nullptr ? p->grad : Tensor());
  run(op);
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

  std::vector<ParameterPtr> trained;
  std::vector<Tensor> shared;
  for (const ParameterPtr& p : projections_) {
    trained.push_back(p->trainable ? p : nullptr);
    shared.push_back(p->value);
  }
  GroupedGemmK projection{
      .a = du, .b = x, .b_rows = plan_.visit_token, .offsets = plan_.group_offsets, .beta = grad_beta_of(trained)};
  projection.compute = compute_;
  for (const ParameterPtr& p : trained) projection.c.push_back(p != nullptr ? p->grad : Tensor());
  run(projection);
  if (!dx.defined()) return;
  const Tensor rows = Tensor::empty({plan_.num_visits, x.dim(1)}, dh.dtype());
  run(GroupedGemmM{.a = du, .offsets = plan_.group_offsets, .b = shared, .c = rows, .compute = compute_});
  run(Combine{.x = rows, .index = plan_.token_visit, .accumulate = true, .y = dx});
}

}  // namespace lightmoe
