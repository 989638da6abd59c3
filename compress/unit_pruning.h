#pragma once
// Structured-sparse parts of merged experts that shrink while recovery trains (MC-SMoE, arXiv 2310.01334; compress/mc_smoe.cpp).
//   Training starts from the whole merged experts, W = U V + S with all units of S: the units that were left out are made again from the
//   original's files. After every step a unit's importance is the moving average of sum |w dL/dw| over its weights in S (beta 0.85), and
//   all but the k(t) most important units of S are set to zero:
//     k(t) = k_end + (F - k_end) (1 - min(1, t / half))^3,   half = half of the steps, k_end = the expert's width in the plan
//   finish() makes the experts that narrow, their units and those of their adapters in the order of importance.
// Deterministic; state() and restore() carry the averages through checkpoints, the weights are in them anyway.

#include <filesystem>
#include <vector>

#include "compress/record.h"
#include "model/olmoe.h"

namespace lightmoe {

class UnitPruner {
 public:
  static constexpr double kBeta = 0.85;

  // The model as it was compressed; its experts become whole. Error(kInput) when `base` is not the original.
  UnitPruner(Olmoe& model, const CompressionRecord& record, const std::filesystem::path& base, int64_t steps);

  // With the gradients of the step still there.
  void after_step(int64_t step);
  void finish();
  int64_t units_at(int64_t step, int64_t last) const;  // k(t)

  Json state() const;
  void restore(const Json& state);

 private:
  struct Part {  // one decomposed expert
    size_t layer = 0, entry = 0;
    int64_t units = 0;  // at the end
    std::vector<double> importance;
  };
  Expert& expert_of(const Part& part) { return model_.blocks[part.layer].moe.experts[part.entry]; }
  void prune(const Part& part, int64_t units);
  std::vector<int32_t> by_importance(const Part& part) const;
  void cut(const Part& part);

  Olmoe& model_;
  int64_t steps_;
  std::vector<Part> parts_;
};

}  // namespace lightmoe
