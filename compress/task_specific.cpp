// Task-specific pruning (arXiv 2206.00277): nothing goes beforehand; experts are chosen while recovery trains (compress/task_pruning.h).
// Published: gate mass per window of steps, experts below beta / Z dropped, at half of training one expert per layer is forced
// (Switch-base-32, top 1). Our reading: Z = experts left in the layer, windows of a twentieth of the steps, beta 0.5 (the paper's value is not
// known to us). Changed: at half of training each layer is cut to the budget instead of to one expert, the same number everywhere, at
// least K; what trains are recovery's adapters, not the whole model. Without recovery the result is the original.

#include "compress/expert_budget.h"

namespace lightmoe {
namespace {

Plan plan(const MethodInput& input) {
  Plan plan = plain_plan(model_size(input.config));
  const int64_t keep = experts_per_layer(input, input.config.num_experts_per_token);
  if (keep < input.config.num_experts) plan.experts_to_keep = keep;
  return plan;
}

const RegisterMethod method{
    {.name = "task-specific",
     .summary = "experts of little gate mass go while recovery trains, down to the budget at half of it",
     .paper = "2206.00277",
     .slots = "removed",
     .plan = &plan,
     .trainable = Trainable::kAdapters,
     .compresses = true}};

}  // namespace
}  // namespace lightmoe
