#include "model/slot_linear.h"

#include <numeric>

#include "kernels/combine.h"
#include "kernels/dispatch_plan.h"
#include "kernels/elementwise.h"
#include "kernels/indexing.h"

namespace lightmoe {
namespace {

DispatchPlan plan_of(const Tensor& slots, int64_t num_slots) {
  std::vector<int32_t> group_of_slot(static_cast<size_t>(num_slots) + 1);
  std::iota(group_of_slot.begin(), group_of_slot.end(), 0);
  group_of_slot.back() = -1;
  return make_dispatch_plan(slots, group_of_slot, num_slots);
}

// The rows of each slot.
std::vector<Tensor> split(const Tensor& w, int64_t num_slots) {
  std::vector<Tensor> parts;
  const int64_t rows = w.dim(0) / num_slots;
  for (int64_t s = 0; s < num_slots; ++s) parts.push_back(w.slice(s * rows, (s + 1) * rows));
  return parts;
}

}  // namespace

Var slot_linear(Tape& tape, const Var& x, const Tensor& slots, const ParameterPtr& w, const ParameterPtr& b,
                int64_t num_slots) {
  const DType dtype = x.value.dtype();
  const int64_t choices = slots.numel(), rows = w->value.dim(0) / num_slots;
  const auto plan = std::make_shared<const DispatchPlan>(plan_of(slots, num_slots));
  const bool trains = w->trainable || (b != nullptr && b->trainable);
  const Var y = Tape::output(Tensor::zeros({choices, rows}, dtype), x.needs_grad() || trains);
  const Tensor of_pairs = Tensor::empty({plan->num_pairs, rows}, dtype);
  run(GroupedGemmM{.a = x.value,
                   .a_rows = plan->pair_token,
                   .offsets = plan->pair_group_offsets,
                   .b = split(w->value, num_slots),
                   .c = of_pairs,
                   .trans_b = true});
  run(ScatterRows{.x = of_pairs, .index = plan->pair_index, .y = y.value});
  if (b != nullptr) {  // a row of zeros for number E
    const Tensor table = Tensor::zeros({num_slots + 1, rows}, dtype), bias = Tensor::empty({choices, rows}, dtype);
    const Tensor values = b->value.reshape({num_slots, rows});
    table.slice(0, num_slots).copy_from(values.dtype() == dtype ? values : values.to(dtype));
    run(ExpandPairs{.x = table, .pair_visit = slots.reshape({choices}), .y = bias});
    run(Add{.a = y.value, .b = bias, .y = y.value});
  }
  tape.record(y, [=, x = Saved(x), dx = x.grad](const Tensor& dy) {
    const Tensor in = x.get(), d = Tensor::empty({plan->num_pairs, rows}, dtype);
    run(ExpandPairs{.x = dy, .pair_visit = plan->pair_index, .y = d});
    if (w->trainable) {
      run(GroupedGemmK{.a = d,
                       .b = in,
                       .b_rows = plan->pair_token,
                       .offsets = plan->pair_group_offsets,
                       .c = split(w->ensure_grad(), num_slots),
                       .beta = 1});
    }
    if (b != nullptr && b->trainable) {
      const Tensor sums = Tensor::empty({num_slots + 1, rows}, dtype);
      run(SumPairs{.x = dy, .pair_visit = slots.reshape({choices}), .y = sums});
      run(Axpy{.x = sums.slice(0, num_slots).reshape({num_slots * rows}), .y = b->ensure_grad()});
    }
    if (!dx) return;
    const Tensor of_x = Tensor::empty({plan->num_pairs, in.dim(1)}, dtype), sum = Tensor::empty(in.shape(), dtype);
    run(GroupedGemmM{.a = d, .offsets = plan->pair_group_offsets, .b = split(w->value, num_slots), .c = of_x});
    run(Combine{.x = of_x, .index = plan->index_pair, .y = sum});
    dx->add(sum);
  });
  return y;
}

}  // namespace lightmoe
