// M-SMoE (arXiv 2310.01334; code UNITES-Lab/MC-SMoE): experts gather around the most used ones and are averaged.
//   1. usage = how often a slot is chosen, divided by the layer's largest; one ranking over all layers decides how many groups each
//      layer keeps, so that busy layers keep fewer;  2. the most used of a layer are the centres;  3. every other slot joins the centre
//      with the largest cosine of router logits (mean over sampled sequences);  4. hidden units are aligned, then averaged by usage.
// Published: 1-4; the code ties the slots of a group and keeps all router rows, as here. Our reading: at least one group a layer. Changed:
// units are aligned to the group's centre (the code: to expert 0 of the layer); MC-SMoE's low-rank step, which trains, is not here.

#include <algorithm>
#include <numeric>

#include "compress/expert_budget.h"
#include "compress/merging.h"

namespace lightmoe {
namespace {

// Groups per layer: those of the `total` most used experts of all layers that are the layer's, at least one.
std::vector<int64_t> groups_per_layer(const MethodInput& input, int64_t total) {
  struct Use {
    double share;
    size_t layer;
  };
  std::vector<Use> uses;
  std::vector<int64_t> counts(input.statistics.layers.size(), 1);  // the most used of each layer first of all
  for (size_t l = 0; l < counts.size(); ++l) {
    std::vector<double> use = input.statistics.layers[l].count;
    std::sort(use.rbegin(), use.rend());
    for (size_t i = 1; i < use.size(); ++i) uses.push_back({use[0] > 0 ? use[i] / use[0] : 0, l});
  }
  std::stable_sort(uses.begin(), uses.end(), [](const Use& a, const Use& b) { return a.share > b.share; });
  for (size_t i = 0; i < uses.size() && std::accumulate(counts.begin(), counts.end(), int64_t{0}) < total; ++i) {
    ++counts[uses[i].layer];
  }
  return counts;
}

Plan plan(const MethodInput& input, const MergeOptions& options) {
  const std::vector<int64_t> counts = groups_per_layer(input, experts_in_all(input, 1));
  return plan_merging(
      input,
      [&](int64_t l) {
        const auto layer = static_cast<size_t>(l);
        return groups_around_most_used(input.statistics.layers[layer], logit_similarity(input.statistics, l),
                                       counts[layer]);
      },
      options);
}
Plan plan_m_smoe(const MethodInput& input) { return plan(input, {.align = true}); }
Plan plan_refit(const MethodInput& input) { return plan(input, {.align = true, .refit = true}); }

const RegisterMethod method{
    {.name = "m-smoe",
     .summary = "average experts around the most used ones, grouped by router logits, units aligned",
     .paper = "2310.01334",
     .slots = "shared",
     .plan = &plan_m_smoe,
     .trainable = Trainable::kAdapters,
     .needs = Needs::kSums,
     .train_free = true,
     .compresses = true}};
const RegisterMethod refit{{.name = "m-smoe-refit",
                            .summary = "M-SMoE with MergeMoE's refit of the down matrices",
                            .paper = "2310.01334",
                            .slots = "shared",
                            .plan = &plan_refit,
                            .trainable = Trainable::kAdapters,
                            .needs = Needs::kInputs,
                            .train_free = true,
                            .compresses = true}};

}  // namespace
}  // namespace lightmoe
