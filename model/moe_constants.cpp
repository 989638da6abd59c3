#include "model/moe_constants.h"

#include "kernels/combine.h"
#include "kernels/elementwise.h"

namespace lightmoe {

ConstantTerms::ConstantTerms(const MoeLayer& layer, const Tensor& slots) : table_(layer.constants) {
  if (table_ == nullptr) return;
  check(slots.device() == DeviceKind::kCpu, ErrorKind::kDevice, "{}: constant slots run on the CPU only, not on {}",
        layer.router->name, name_of(slots.device()));
  std::vector<int32_t> constant_of_slot;
  for (const Slot& slot : layer.slots) {
    constant_of_slot.push_back(slot.kind == SlotKind::kConstant ? slot.constant : -1);
  }
  constant_of_slot.push_back(-1);
  const int64_t constants = table_->value.dim(0);
  plan_ = make_dispatch_plan(slots, constant_of_slot, constants);
  std::vector<int32_t> constant(static_cast<size_t>(plan_.num_pairs));
  const int32_t* offsets = plan_.pair_group_offsets.data<int32_t>();
  for (int64_t c = 0; c < constants; ++c) {
    for (int32_t p = offsets[c]; p < offsets[c + 1]; ++p) constant[static_cast<size_t>(p)] = static_cast<int32_t>(c);
  }
  constant_of_pair_ = Tensor::from(constant, {plan_.num_pairs});
}

// The table in the type of the activations.
Tensor ConstantTerms::rows_as(DType dtype) const {
  return table_->value.dtype() == dtype ? table_->value : table_->value.to(dtype);
}

void ConstantTerms::add_to_y(const Tensor& gates, const Tensor& y) const {
  const Tensor index = Tensor::empty(plan_.index_pair.shape(), DType::kI32);
  const int32_t *pair = plan_.index_pair.data<int32_t>(), *constant = constant_of_pair_.data<int32_t>();
  for (int64_t i = 0; i < index.numel(); ++i) index.data<int32_t>()[i] = pair[i] < 0 ? -1 : constant[pair[i]];
  run(Combine{.x = rows_as(y.dtype()), .index = index, .scales = gates, .accumulate = true, .y = y});
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
