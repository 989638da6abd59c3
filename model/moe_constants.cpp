#include "model/moe_constants.h"

#include "kernels/combine.h"
#include "kernels/elementwise.h"
#include "kernels/indexing.h"

namespace lightmoe {

ConstantTerms::ConstantTerms(const MoeLayer& layer, const Tensor& slots) : table_(layer.constants) {
  if (table_ == nullptr) return;
  std::vector<int32_t> constant_of_slot;
  for (const Slot& slot : layer.slots) {
    constant_of_slot.push_back(slot.kind == SlotKind::kConstant ? slot.constant : -1);
  }
  constant_of_slot.push_back(-1);
  plan_ = make_dispatch_plan(slots, constant_of_slot, table_->value.dim(0));
  constant_ = Tensor::empty(slots.shape(), DType::kI32);
  const auto count = static_cast<int64_t>(constant_of_slot.size());
  run(Lookup{.table = Tensor::from(constant_of_slot, {count}), .index = slots, .y = constant_});
  constant_of_pair_ = Tensor::empty({plan_.num_pairs}, DType::kI32);
  run(Lookup{.table = constant_.reshape({constant_.numel()}), .index = plan_.pair_index, .y = constant_of_pair_});
}

// The table in the type of the activations.
Tensor ConstantTerms::rows_as(DType dtype) const {
  return table_->value.dtype() == dtype ? table_->value : table_->value.to(dtype);
}

void ConstantTerms::add_to_y(const Tensor& gates, const Tensor& y) const {
  run(Combine{.x = rows_as(y.dtype()), .index = constant_, .scales = gates, .accumulate = true, .y = y});
}

void ConstantTerms::backward(const Tensor& dy, const Tensor& gates, const Tensor& dgates) const {
  const Tensor rows = Tensor::empty({plan_.num_pairs, dy.dim(1)}, dy.dtype());
  run(ExpandPairs{.x = rows_as(dy.dtype()), .pair_visit = constant_of_pair_, .y = rows});
  const Tensor gated = Tensor::empty(rows.shape(), rows.dtype());
  run(GatedSumBackward{.a = rows,
                       .ds = dy,
                       .gates = gates,
                       .pair_index = plan_.pair_index,
                       .pair_visit = plan_.pair_token,
                       .da = gated,
                       .dgates = dgates});
  if (!table_->trainable) return;
  const Tensor sum = Tensor::empty({table_->value.dim(0), dy.dim(1)}, dy.dtype());
  run(SumPairs{.x = gated, .pair_visit = constant_of_pair_, .y = sum});
  const double beta = table_->grad_beta();
  Tensor& grad = table_->grad;
  if (beta == 0) return grad.copy_from(sum);
  run(Axpy{.alpha = 1, .x = sum, .y = grad});
}

}  // namespace lightmoe
