#pragma once
// How different the experts of a layer are (what OMoE, arXiv 2310.09762, wants to raise): cosine of every pair.
//   weights   of gate, up and down laid end to end
//   outputs   of f_i(x) and f_j(x), averaged over the rows x of a token sample (`calibrate --sample-inputs`)
// Stored experts of a compressed model count once each; adapters are left out. 1 - mean |cosine| may serve as "diversity".

#include <cstdint>
#include <filesystem>
#include <vector>

#include "compress/statistics.h"

namespace lightmoe {

struct CosineSummary {
  double mean = 0, mean_abs = 0, largest = 0;  // over pairs
};
struct LayerDiversity {
  int64_t layer = 0, experts = 0;
  CosineSummary weights, outputs;  // outputs: zero without a sample
};
// vectors [n, m] f64, n >= 2.
CosineSummary pairwise_cosine(const Tensor& vectors);
// statistics: null, or of this model with a sample of inputs (Error(kUsage) without one); at most `limit` rows of it are used.
std::vector<LayerDiversity> expert_diversity(const std::filesystem::path& model, const Statistics* statistics,
                                             int64_t limit);

}  // namespace lightmoe
