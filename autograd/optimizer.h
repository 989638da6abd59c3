#pragma once
// AdamW (kernels/adamw.h) over the trainable ones of a list of parameters. Moments are f32 (f64 for f64 weights), booked as
// optimizer memory, allocated at a parameter's first update. A bf16 weight has an f32 master copy beside its moments: the update
// acts on that and the weight is its rounding, as bf16 itself would lose every update below 1/512 of a weight. A trainable parameter without a gradient counts as zero gradient
// (its moments fade and its decay acts), as in the golden steps; a frozen one is never touched and costs nothing.
// Clipping multiplies all gradients by min(1, clip_norm / norm) inside the update: no pass of its own.

#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "autograd/parameter.h"

namespace lightmoe {

// Parameter group as a rule instead of a list: what differs for one parameter.
struct ParameterRule {
  double lr_scale = 1;
  double decay_scale = 1;  // times weight_decay
};
struct OptimizerOptions {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0.1;
  double clip_norm = 1;                                 // 0 = off
  std::function<ParameterRule(const Parameter&)> rule;  // empty: every parameter alike
};
// No decay for vectors (norm weights); the usual choice, not the golden one.
ParameterRule no_decay_for_vectors(const Parameter& parameter);

class Optimizer {
 public:
  Optimizer(std::vector<ParameterPtr> parameters, OptimizerOptions options);

  double gradient_norm() const;  // of the trainable parameters, before clipping; NaN or inf when any gradient is
  // One update with the given norm (as returned by gradient_norm()); gradients are left as they are.
  void step(double lr, double norm);
  void zero_grad();

  int64_t updates() const { return updates_; }  // bias correction counts these
  const std::vector<ParameterPtr>& parameters() const { return parameters_; }

  // For checkpoints: what an update keeps of one parameter, allocated (zeros, and the weight as it is) when absent.
  struct Moments {
    Tensor m, v;
    Tensor master;  // undefined for f32 and f64 weights
  };
  Moments& moments(const Parameter& parameter);
  bool has_moments(const Parameter& parameter) const { return moments_.count(&parameter) != 0; }
  void set_updates(int64_t updates) { updates_ = updates; }

 private:
  std::vector<ParameterPtr> parameters_;
  OptimizerOptions options_;
  std::unordered_map<const Parameter*, Moments> moments_;
  int64_t updates_ = 0;
};

// Bytes before anything is allocated.
struct TrainingMemory {
  int64_t weight_bytes = 0, gradient_bytes = 0, optimizer_bytes = 0;
  int64_t parameters = 0, trainable = 0;  // elements
  int64_t total_bytes() const { return weight_bytes + gradient_bytes + optimizer_bytes; }
};
TrainingMemory training_memory(const std::vector<ParameterPtr>& parameters);

}  // namespace lightmoe
