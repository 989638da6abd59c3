#pragma once
// One set of weights per sequence, blended from fine-tunes of one base (WEMoE, arXiv 2402.00433): W = W0 + sum_i w_i (W_i - W0).
// Published: MLPs are blended by a small router trained by minimising the output's entropy at test time. Ours: every weight is
// blended, and w is given, or follows from the prompt alone (the perplexity routing of MergeME, arXiv 2502.00997):
//   w = softmax(-loss_i / temperature),  loss_i = mean cross-entropy of the prompt's tokens under fine-tune i
// w = one-hot is that fine-tune, bit for bit (blended in f64, rounded once to f32); w = 0 is the base.
// NOTE: all models are in memory, and a blend writes all weights: a form to study, not to serve.

#include <filesystem>
#include <memory>
#include <vector>

#include "model/olmoe.h"

namespace lightmoe {

class WeightBlend {
 public:
  // Error(kInput) when a fine-tune has another shape than the base.
  WeightBlend(const std::filesystem::path& base, const std::vector<std::filesystem::path>& models);
  size_t count() const { return models_.size(); }
  // The blended model as it is now; first the base.
  const Olmoe& model() const { return *blend_; }
  void set(const std::vector<double>& weights);
  // For a prompt of at least two tokens; shorter: equal weights.
  std::vector<double> weights_for(const std::vector<int32_t>& prompt, double temperature) const;

 private:
  std::unique_ptr<Olmoe> base_, blend_;
  std::vector<std::unique_ptr<Olmoe>> models_;
};

}  // namespace lightmoe
