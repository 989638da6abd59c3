#pragma once
// Differentiable ops: each allocates its output, runs a kernel and records the backward kernel. Equations, dtypes and tolerated
// shapes are those of kernels/<op>.h. Activations are f32 (f64 when the weights are f64); weights f32, bf16 or f64.
// Frozen weights get neither gradient memory nor a product; inputs without gradient get no dX product.
// Losses are the roots of backward: they return the loss and put `scale` times its gradient into their input and weights.

#include <optional>

#include "autograd/tape.h"
#include "kernels/attention.h"
#include "kernels/dispatch_plan.h"
#include "kernels/gemm.h"
#include "kernels/qk_norm_rope.h"

namespace lightmoe {

DType activation_dtype(DType weight);  // f64 for f64, else f32

Var embedding(Tape& tape, const Tensor& ids, const ParameterPtr& table);
Var rms_norm(Tape& tape, const Var& x, const ParameterPtr& w, double eps);
// sum = x + branch, written over branch, which nothing else reads any more; without branch (an empty Var) sum is x. y is sum's norm.
// In backward the gradient that sum's other readers give is added in the same pass.
struct Normed {
  Var sum, y;
};
Normed add_rms_norm(Tape& tape, const Var& x, const Var& branch, const ParameterPtr& w, double eps);
Var linear(Tape& tape, const Var& x, const ParameterPtr& w, GemmCompute compute);
Var clamp(Tape& tape, const Var& x, double limit);
Var swiglu(Tape& tape, const Var& h);
// Norm, limit (infinity: none) and rotation of queries and keys, written over them where nothing is recorded: nothing else reads them.
// k may be empty.
struct QueriesKeys {
  Var q, k;
};
struct QkNorm {
  ParameterPtr q, k;
  double eps = 1e-5, limit = std::numeric_limits<double>::infinity();
};
QueriesKeys qk_norm_rope(Tape& tape, const QueriesKeys& x, const QkNorm& norm, const HeadTurns& turns);
Var add_in_place(Tape& tape, const Var& x, const Var& branch);  // over branch, which nothing else reads any more
// Keys and values are this batch's own rows.
Var attention(Tape& tape, const Var& q, const Var& k, const Var& v, const AttentionSequences& sequences,
              int64_t head_dim);

struct Routing {
  Tensor slots, logits;
  Var probs, gates;
  std::optional<DispatchPlan> plan;
};
// groups: make the plan of the choice too (kernels/router_dispatch.h).
struct DispatchGroups {
  const std::vector<int32_t>& group_of_slot;
  int64_t num_groups;
};
Routing router(Tape& tape, const Var& x, const ParameterPtr& w, const Tensor& removed, int64_t top_k, bool renormalize,
               const DispatchGroups* groups = nullptr);

// A loss as it stands on the device. value() waits for it: a step queues its backward first.
struct Loss {
  Tensor sum;  // f64 [1]
  double scale = 1;
  double value() const;  // sum / scale
};
// Sum over labelled rows (value() is not scaled).
Loss lm_head_loss(Tape& tape, const Var& x, const ParameterPtr& w, const Tensor& labels, double scale,
                  GemmCompute compute);
// One entry per layer.
Loss load_balance_loss(Tape& tape, const std::vector<Var>& probs, const std::vector<Tensor>& slots, const Tensor& mask,
                       double scale);
// Mean over layers and unmasked tokens of -sum_e p_e ln p_e (removed slots, p = 0, count nothing); gradient of `scale` times it.
Loss router_entropy_loss(Tape& tape, const std::vector<Var>& probs, const Tensor& mask, double scale);
// <y, weights>: a root for gradient checks.
double dot_loss(Tape& tape, const Var& y, const Tensor& weights);

}  // namespace lightmoe
