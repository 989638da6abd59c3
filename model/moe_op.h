#pragma once
// Forward and backward of the experts of one MoE layer on its slot table (equations in model/moe.h), differentiable.
//   y[t] = sum_k gates[t,k] f_{slots[t,k]}(x[t])
// x, y [T,D] f32 or f64; slots i32 [T,K]; gates [T,K]. A slot that was masked (removed) is never in `slots`.
// plan: of these slots and the layer's groups (MoeGroups), where the router has made it (kernels/router_dispatch.h); null: made here.
// Kept for backward: x (rebuilt from the norm before it), gates, the plan, h [P,2F] after its low-rank terms and what is R wide; SwiGLU is recomputed from h.
// Frozen experts get no weight product. The layer must not change between forward and backward.

#include "autograd/ops.h"
#include "kernels/dispatch_plan.h"
#include "model/moe.h"

namespace lightmoe {

Var moe_experts(Tape& tape, const Var& x, const MoeLayer& layer, const Tensor& slots, const Var& gates,
                GemmCompute compute, const DispatchPlan* plan = nullptr);

// How layers run, for the process. base_once: rule 1 of model/moe.h; without it every slot runs the expert it points to for itself, as
// other systems do (for comparison; the same function). fused: in few kernels where the layer allows (model/moe_fused.h); automatic means
// on every device but the CPU, whose step-by-step form is the faster.
enum class MoeFusion : uint8_t { kAutomatic, kOn, kOff };
struct MoeExecution {
  bool base_once = true;
  MoeFusion fused = MoeFusion::kAutomatic;
};
MoeExecution moe_execution();
void set_moe_execution(MoeExecution execution);
class MoeExecutionScope {
 public:
  explicit MoeExecutionScope(MoeExecution execution) : previous_(moe_execution()) { set_moe_execution(execution); }
  ~MoeExecutionScope() { set_moe_execution(previous_); }
  MoeExecutionScope(const MoeExecutionScope&) = delete;
  MoeExecutionScope& operator=(const MoeExecutionScope&) = delete;

 private:
  MoeExecution previous_;
};

// What base-once execution can save on these choices: how many tokens chose r replaced slots (those that share their expert with other
// slots), and how many of the experts those point to are distinct.
struct ReplacedHistogram {
  std::vector<int64_t> replaced, distinct_bases;  // [K+1] tokens with that many
  double mean_replaced() const;
  double mean_distinct_bases() const;
  void add(const ReplacedHistogram& other);
};
ReplacedHistogram replaced_histogram(const MoeLayer& layer, const Tensor& slots);  // slots i32 [T,K]

// u8 [E], 1 = removed; undefined when no slot is.
Tensor removed_mask(const MoeLayer& layer);

}  // namespace lightmoe
