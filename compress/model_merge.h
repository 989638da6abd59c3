#pragma once
// Several fine-tuned OLMoE checkpoints of one shape into one, tensor by tensor, never in place (MergeME, arXiv 2502.00997, merges its
// dense parts by TIES and DARE; here every tensor of an MoE, expert by expert: slot e of one model is slot e of the others, as they
// come from one base). W0 is the base, t_i = W_i - W0 a task vector, c_i its weight, s = --scale:
//   average  sum_i c_i W_i, weights divided by their sum; needs no base
//   task     W0 + s sum_i c_i t_i                                       (task arithmetic, arXiv 2212.04089)
//   ties     t_i loses all but its `density` largest entries in size; sign = that of sum_i c_i t_i; W0 + s (weighted mean of the
//            entries that have that sign)                               (arXiv 2306.01708)
//   dare     entries of t_i are dropped with probability 1 - density and the rest divided by density, then as task
//                                                                       (arXiv 2311.03099)
// Ours: TIES trims each tensor by itself (published: the whole task vector), so that one tensor is in memory at a time. DARE's draw is
// a function of (seed, model, tensor, element). Computed in f64, rounded once; ties in size keep the lower index.

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/tensor.h"

namespace lightmoe {

enum class MergeRule : uint8_t { kAverage, kTask, kTies, kDare };
MergeRule parse_merge_rule(std::string_view name);  // Error(kUsage) listing the names

struct ModelMergeJob {
  std::vector<std::filesystem::path> models;
  std::filesystem::path base;  // empty: none (average alone)
  std::filesystem::path output;
  MergeRule rule = MergeRule::kAverage;
  std::vector<double> weights;  // one per model; empty: 1 each
  double scale = 1;
  double density = 0.2;  // ties, dare
  uint64_t seed = 1;     // dare
  std::optional<DType> dtype;
  bool force = false, allow_nonfinite = false;
};
struct ModelMergeReport {
  int64_t tensors = 0, bytes = 0;
};
// Error(kUsage): options that do not fit the rule; Error(kInput): models of different shape, naming file and tensor.
ModelMergeReport merge_models(const ModelMergeJob& job);

// One tensor: n values of each task vector, weights as they are used.
struct TaskVectors {
  std::vector<std::vector<double>> deltas;
  std::vector<double> weights;
};
// Keeps the ceil(density n) largest in absolute value.
void keep_largest(std::vector<double>& values, double density);
void drop_at_random(std::vector<double>& values, double density, uint64_t seed, uint64_t stream);
std::vector<double> weighted_sum(const TaskVectors& tasks);
std::vector<double> elect_and_mean(const TaskVectors& tasks);  // TIES after trimming

}  // namespace lightmoe
