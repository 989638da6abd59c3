// NAEE, greedy (arXiv 2402.14800; code Lucky-Lance/Expert_Sparsity): remove the experts whose absence changes the layer's output least.
//   Published: for EVERY subset of r experts, rerun the layer with the others' logits at -inf and keep the subset of least ||Y - Y'||_F;
//   calibrated layer by layer. With 64 experts that is 10^18 subsets, so what can be run on OLMoE is not the published search.
//   Ours, and the name says so: from all experts, again and again remove the one whose removal leaves the least ||Y - Y'||_F, Y from the
//   complete layer. Routing is done anew for every candidate: softmax over those that are left, the K largest.
// Sample: at most 256 tokens of the calibration's. Dynamic skipping is an option of running a model (compress/skipping.h).
// cost per layer: E outputs of every token, then about E^2/2 candidates of N K D operations.

#include <algorithm>
#include <limits>
#include <numeric>

#include "compress/expert_budget.h"
#include "compress/expert_sample.h"
#include "compress/pruning.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kTokens = 256;

class Layer {
 public:
  Layer(const MethodInput& input, int64_t layer)
      : sample_(layer_sample(input, layer, kTokens)),
        slots_(static_cast<size_t>(input.config.num_experts)),
        top_k_(static_cast<size_t>(input.config.num_experts_per_token)),
        width_(static_cast<size_t>(input.config.hidden_size)),
        renormalize_(input.config.norm_topk_prob) {
    for (int64_t e = 0; e < input.config.num_experts; ++e) {
      const ExpertMatrices expert = read_expert(*input.experts, layer, e);
      outputs_.push_back(expert_output(expert, expert_hidden(expert, sample_.x)));
    }
    order_.resize(tokens() * slots_);
    for (size_t t = 0; t < tokens(); ++t) {
      const auto begin = order_.begin() + static_cast<std::ptrdiff_t>(t * slots_);
      std::iota(begin, begin + static_cast<std::ptrdiff_t>(slots_), 0);
      const double* p = &sample_.probs[t * slots_];
      std::stable_sort(begin, begin + static_cast<std::ptrdiff_t>(slots_),
                       [p](int32_t a, int32_t b) { return p[a] > p[b]; });
    }
    complete_ = output(std::vector<uint8_t>(slots_, 0));
  }

  // Survivors.
  std::vector<int32_t> prune(size_t kept) const {
    std::vector<uint8_t> removed(slots_, 0);
    for (size_t left = slots_; left > kept; --left) removed[cheapest(removed)] = 1;
    std::vector<int32_t> survivors;
    for (size_t e = 0; e < slots_; ++e) {
      if (!removed[e]) survivors.push_back(static_cast<int32_t>(e));
    }
    return survivors;
  }

 private:
  size_t tokens() const { return static_cast<size_t>(sample_.tokens()); }

  size_t cheapest(const std::vector<uint8_t>& removed) const {
    std::vector<double> errors(slots_, std::numeric_limits<double>::infinity());
    parallel_items(static_cast<int64_t>(slots_), [&](int64_t e) {
      if (removed[static_cast<size_t>(e)]) return;
      std::vector<uint8_t> candidate = removed;
      candidate[static_cast<size_t>(e)] = 1;
      const std::vector<double> y = output(candidate);
      double sum = 0;
      for (size_t i = 0; i < y.size(); ++i) sum += (y[i] - complete_[i]) * (y[i] - complete_[i]);
      errors[static_cast<size_t>(e)] = sum;
    });
    return static_cast<size_t>(std::min_element(errors.begin(), errors.end()) - errors.begin());
  }

  // The layer without the removed experts, [N*D].
  std::vector<double> output(const std::vector<uint8_t>& removed) const {
    std::vector<double> y(tokens() * width_, 0.0);
    for (size_t t = 0; t < tokens(); ++t) {
      const double* p = &sample_.probs[t * slots_];
      double all = 0, chosen = 0;
      std::vector<int32_t> choice;
      for (size_t i = 0; i < slots_; ++i) {
        const int32_t e = order_[t * slots_ + i];
        if (removed[static_cast<size_t>(e)]) continue;
        all += p[e];
        if (choice.size() == top_k_) continue;
        choice.push_back(e);
        chosen += p[e];
      }
      for (const int32_t e : choice) {
        const double gate = p[e] / (renormalize_ ? chosen : all);
        const float* f = outputs_[static_cast<size_t>(e)].data<float>() + t * width_;
        for (size_t i = 0; i < width_; ++i) y[t * width_ + i] += gate * static_cast<double>(f[i]);
      }
    }
    return y;
  }

  LayerSample sample_;
  size_t slots_, top_k_, width_;
  bool renormalize_;
  std::vector<Tensor> outputs_;  // per expert [N,D]
  std::vector<int32_t> order_;   // per token, slots by descending probability
  std::vector<double> complete_;
};

Plan plan(const MethodInput& input) {
  const auto kept = static_cast<size_t>(experts_per_layer(input, input.config.num_experts_per_token));
  const auto slots = static_cast<size_t>(input.config.num_experts);
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    std::vector<int32_t> survivors(kept);
    std::iota(survivors.begin(), survivors.end(), 0);
    if (kept < slots && input.experts != nullptr) survivors = Layer(input, l).prune(kept);
    plan.layers.push_back(surviving_layer(input, l, survivors));
  }
  return plan;
}

const RegisterMethod method{{.name = "naee-greedy",
                             .summary = "remove, one by one, the expert the layer's output misses least",
                             .paper = "2402.14800",
                             .slots = "removed",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kInputs,
                             .train_free = true,
                             .compresses = true,
                             .redirects = true}};

}  // namespace
}  // namespace lightmoe
