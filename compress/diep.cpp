// DiEP, differentiable expert pruning (arXiv 2509.16105): how many experts a layer loses is learned, not set.
//   1. every expert gets a weight alpha (softmax within its layer), every layer a weight beta; both learned on the calibration's token
//      sample, the model frozen (compress/diep_training.h).  2. score = softmax(alpha)_i beta_l.  3. the lowest of ALL layers go.
//   4. at run time the choices a token needs least are skipped (`--skip-experts`, compress/skipping.h).
// Published: 1-4; 128 samples, 10 epochs, batch 16, lr 5e-3 with cosine decay, alpha and beta 3 : 1, lambda 0.01; in eq. 5 the relaxed layer
// sums ALL experts with alpha in place of the router's weights. Our reading: the softmaxed alpha in the score; Adam (eq. 8 and 9 write a
// plain step, but 5e-3 times these gradients moves no alpha by more than 0.03 in 150 steps). Changed: the reconstruction
// compares final hidden states H, relative to || H ||_F (the bare norm grows with tokens and width and drowned the cross-entropy); at least
// K experts per layer stay. The cross-entropy falls where the data's loss does: a model that was trained on answers alone says nothing
// about prompts.
// Reads the whole model into memory (as it is stored).

#include <algorithm>

#include "compress/diep_training.h"
#include "compress/expert_budget.h"
#include "compress/pruning.h"
#include "compress/weights.h"

namespace lightmoe {
namespace {

struct ScoredExpert {
  double score;
  int32_t layer, slot;
};

Plan plan(const MethodInput& input) {
  const int64_t layers = input.config.num_layers, slots = input.config.num_experts;
  const int64_t least = least_survivors(input), all = experts_in_all(input, least);
  std::vector<std::vector<double>> scores(static_cast<size_t>(layers),
                                          std::vector<double>(static_cast<size_t>(slots), 1.0));
  if (input.experts != nullptr && all < layers * slots) {  // else arithmetic only, or nothing to choose
    const DType dtype = input.experts->place(0, 0, ExpertMatrix::kGate).dtype;
    const auto model = load_model(input.experts->directory(), dtype == DType::kF32 ? DType::kF32 : DType::kBF16);
    const ExpertImportance learned = learn_importance(*model, input.statistics, {.seed = input.options.seed});
    for (size_t l = 0; l < scores.size(); ++l) {
      for (size_t e = 0; e < scores[l].size(); ++e) scores[l][e] = learned.beta[l] * learned.alpha[l][e];
    }
  }
  std::vector<std::vector<int32_t>> kept(static_cast<size_t>(layers));
  std::vector<ScoredExpert> others;
  for (size_t l = 0; l < scores.size(); ++l) {
    apply_starved_policy(input, static_cast<int64_t>(l), scores[l]);
    const std::vector<int32_t> order = by_descending_score(scores[l]);
    kept[l].assign(order.begin(), order.begin() + least);
    for (auto slot = order.begin() + least; slot != order.end(); ++slot) {
      others.push_back({scores[l][static_cast<size_t>(*slot)], static_cast<int32_t>(l), *slot});
    }
  }
  std::stable_sort(others.begin(), others.end(),
                   [](const ScoredExpert& a, const ScoredExpert& b) { return a.score > b.score; });
  for (int64_t i = 0; i < all - layers * least; ++i) {
    const ScoredExpert& expert = others[static_cast<size_t>(i)];
    kept[static_cast<size_t>(expert.layer)].push_back(expert.slot);
  }
  Plan plan;
  for (int64_t l = 0; l < layers; ++l) {
    plan.layers.push_back(surviving_layer(input, l, kept[static_cast<size_t>(l)]));
  }
  return plan;
}

const RegisterMethod method{{.name = "diep",
                             .summary = "weights of experts and layers learned on a sample; the lowest of the model go",
                             .paper = "2509.16105",
                             .slots = "removed",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kTokens,
                             .train_free = true,
                             .compresses = true,
                             .redirects = true}};

}  // namespace
}  // namespace lightmoe
