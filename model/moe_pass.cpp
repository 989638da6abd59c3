#include "model/moe_pass.h"

#include "kernels/merge_slots.h"
#include "model/moe_op.h"

namespace lightmoe {
namespace {

// Of the stored experts, 0 without any.
int64_t expert_width(const MoeLayer& layer) {
  for (const Expert& expert : layer.experts) {
    if (expert.down != nullptr) return expert.down->value.dim(1);
  }
  return 0;
}

int64_t slot_width(const MoeLayer& layer) {
  for (const Slot& slot : layer.slots) {
    if (slot.adapter < 0 || slot.kind == SlotKind::kRemoved) continue;
    return layer.adapters[static_cast<size_t>(slot.adapter)].b_gate->value.dim(0);
  }
  if (const int64_t width = expert_width(layer); width > 0) return width;
  for (const Latent& latent : layer.latents) return latent.a_gate->value.dim(0);
  for (const AnnealedSlot& annealed : layer.annealed) return annealed.original.down->value.dim(1);
  return 0;
}

}  // namespace

void run_grouped(GroupedGemmM op) {
  const std::vector<Tensor> all = op.b;
  std::vector<bool> done(all.size(), false);
  for (size_t first = 0; first < all.size(); ++first) {
    if (done[first] || !all[first].defined()) continue;
    for (size_t g = 0; g < all.size(); ++g) {
      const bool now = all[g].defined() && all[g].dtype() == all[first].dtype();
      op.b[g] = now ? all[g] : Tensor();
      done[g] = done[g] || now;
    }
    run(op);
  }
}

MoePass::MoePass(const MoeLayer& layer, GemmCompute compute, DType rows, const Tensor& slots, const Tensor& gates,
                 const DispatchPlan* plan)
    : groups_(layer, moe_execution().base_once), compute_(compute), dtype_(rows), gates_(gates), chosen_(slots) {
  const bool merges = !groups_.lane_of_slot.empty();
  if (merges) merge(slots);
  plan_ = plan != nullptr && !merges
              ? *plan
              : make_dispatch_plan(chosen_, groups_.group_of_slot, static_cast<int64_t>(groups_.groups.size()));
  constants_.emplace(layer, chosen_);
  width_ = slot_width(layer);
  bank_width_ = expert_width(layer) > 0 ? expert_width(layer) : width_;
  zero_rows_ = has_zero_rows(groups_, plan_);
}

void MoePass::merge(const Tensor& slots) {
  const Tensor merged = Tensor::empty(slots.shape(), DType::kI32), gates = Tensor::empty(slots.shape(), gates_.dtype());
  first_ = Tensor::empty(slots.shape(), DType::kI32);
  const Tensor lanes = Tensor::from(groups_.lane_of_slot, {static_cast<int64_t>(groups_.lane_of_slot.size())});
  run(MergeSlots{.slots = slots,
                 .gates = gates_,
                 .lane_of_slot = lanes,
                 .merged_slots = merged,
                 .merged_gates = gates,
                 .first = first_});
  gates_ = gates, chosen_ = merged;
}

void MoePass::visit_product(const Tensor& a, const Tensor& a_rows, ExpertHalf half, bool trans_b,
                            const Tensor& c) const {
  const std::vector<uint8_t> all(groups_.groups.size(), 1);
  visit_product({.a = a, .a_rows = a_rows, .offsets = {}, .b = {}, .c = c, .trans_b = trans_b}, half, {all, 1});
}

void MoePass::visit_product(GroupedGemmM op, ExpertHalf half, const SomeGroups& some) const {
  op.offsets = plan_.group_offsets, op.compute = compute_;
  const bool by_halves = half == ExpertHalf::kGateUp && bank_width_ < width_;  // never of fused layers
  use_group_weights(groups_, plan_, half, dtype_ == DType::kBF16 ? DType::kF32 : dtype_,
                    [&](const std::vector<Tensor>& weights) {
                      op.b = weights;
                      for (size_t g = 0; g < op.b.size(); ++g) {
                        if (some.marks[g] != some.wanted) op.b[g] = Tensor();
                      }
                      by_halves ? halves_product(op, op.b) : run_grouped(op);
                      op.b.clear();  // blends go before the next ones come
                    });
}

// Gate and up of experts with fewer units than the rows have: each half into (or out of) the first columns of its half of the rows.
void MoePass::halves_product(GroupedGemmM op, const std::vector<Tensor>& weights) const {
  for (const int64_t half : {0, 1}) {
    op.b.clear();
    for (const Tensor& w : weights) {
      op.b.push_back(w.defined() ? w.slice(half * bank_width_, (half + 1) * bank_width_) : Tensor());
    }
    (op.trans_b ? op.c_column : op.a_column) = half * width_;
    if (!op.trans_b) op.beta = static_cast<double>(half);
    run_grouped(op);
  }
}

void MoePass::weight_gradient(ExpertHalf half, GroupedGemmK op) const {
  std::vector<ParameterPtr> own(groups_.groups.size()), blended(groups_.groups.size());
  bool any_blended = false;
  for (size_t g = 0; g < own.size(); ++g) {
    const MoeGroup& group = groups_.groups[g];
    if (half_of(group.bank, half) == nullptr || !half_of(group.bank, half)->trainable) continue;
    (group.annealed() ? blended : own)[g] = half_of(group.bank, half);
    any_blended = any_blended || group.annealed();
  }
  const auto run_for = [&](const std::vector<ParameterPtr>& parameters, double alpha) {
    op.alpha = alpha, op.beta = grad_beta_of(parameters), op.compute = compute_, op.offsets = plan_.group_offsets;
    const bool by_halves = half == ExpertHalf::kGateUp && bank_width_ < width_;
    for (const int64_t part : by_halves ? std::vector<int64_t>{0, 1} : std::vector<int64_t>{0}) {
      op.c.clear();
      for (const ParameterPtr& p : parameters) {
        const Tensor whole = p != nullptr ? p->grad : Tensor();
        op.c.push_back(by_halves && whole.defined() ? whole.slice(part * bank_width_, (part + 1) * bank_width_)
                                                    : whole);
      }
      op.a_column = part * width_;
      run(op);
    }
  };
  run_for(own, 1);
  if (any_blended && groups_.beta < 1) run_for(blended, 1 - groups_.beta);  // d(blend) / d(bank)
}

Tensor MoePass::unmerged(const Tensor& dgates) const {
  if (!first_.defined()) return dgates;
  const Tensor spread = Tensor::empty(dgates.shape(), dgates.dtype());
  run(MergeSlotsBackward{.dmerged = dgates, .first = first_, .dgates = spread});
  return spread;
}

}  // namespace lightmoe
