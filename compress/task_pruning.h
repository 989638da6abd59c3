#pragma once
// Task-specific pruning (arXiv 2206.00277): experts go while the model is fine-tuned, by what the task's tokens choose.
//   In the first half of training the gate mass of every expert is summed over windows of steps. At the end of a window experts whose
//   share of their layer's mass is below kBeta / Z (Z survivors) are masked, the smallest first; at half of training each layer is
//   cut down to its budget by the last window's mass, and the rest of training adapts to that.
// Masks live in the model's slot tables; the matrices of what went leave memory in finish(), for the optimiser knows them until then.
// Deterministic; state() and restore() carry it through checkpoints.

#include <memory>
#include <vector>

#include "compress/plan.h"
#include "loaders/json_type.h"
#include "model/olmoe.h"

namespace lightmoe {

class TaskPruner {
 public:
  static constexpr double kBeta = 0.5;
  static constexpr int64_t kWindows = 10;  // in the first half

  // keep: experts per layer at the end, at least num_experts_per_tok. The model is a stock one, with adapters.
  TaskPruner(Olmoe& model, int64_t keep, int64_t steps);

  const Observer* observer() const { return &observer_; }
  void before_step(int64_t step);
  // What is left; the model then has these experts alone.
  Plan finish();

  Json state() const;
  void restore(const Json& state);

 private:
  std::vector<int32_t> survivors(size_t layer) const;
  void drop(size_t layer, int32_t slot);
  // Masks the lightest, those below kBeta times the mean share or all, never leaving fewer than keep_.
  void prune_layer(size_t layer, bool all);

  Olmoe& model_;
  int64_t keep_, half_, window_;
  std::vector<std::vector<double>> mass_;  // [L][E] of this window
  Observer observer_;
};

}  // namespace lightmoe
