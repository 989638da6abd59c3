// MergeMoE (arXiv 2510.14436): a merge whose down matrix is fitted to what the members' outputs would have been.
//   centres = the most used M experts;  the others join the centre whose gate and up weights are most like theirs;  gate and up = means
//   weighted by use;  down in closed form (compress/merging.h).
// Published (a note; no code): the above. Our reading: likeness = cosine of [gate, up] as one vector; w = share of use within the group;
// uniform M. Changed: a small ridge towards the mean instead of the bare pseudo-inverse.

#include <cmath>

#include "compress/expert_budget.h"
#include "compress/merging.h"

namespace lightmoe {
namespace {

std::vector<double> weight_cosines(const MethodInput& input, int64_t layer) {
  if (input.experts == nullptr) return {};  // arithmetic only
  std::vector<ExpertId> list;
  for (int64_t e = 0; e < input.config.num_experts; ++e) list.push_back({layer, e});
  std::vector<double> sum = expert_products(*input.experts, input.config, list, ExpertMatrix::kGate);
  const std::vector<double> up = expert_products(*input.experts, input.config, list, ExpertMatrix::kUp);
  const size_t n = list.size();
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += up[i];
  std::vector<double> cosines(sum.size());
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < n; ++j) {
      const double norms = std::sqrt(sum[i * n + i]) * std::sqrt(sum[j * n + j]);
      cosines[i * n + j] = norms > 0 ? sum[i * n + j] / norms : 0;
    }
  }
  return cosines;
}

Plan plan(const MethodInput& input) {
  const int64_t centres = experts_per_layer(input, 1);
  return plan_merging(input,
                      [&](int64_t l) {
                        return groups_around_most_used(input.statistics.layers[static_cast<size_t>(l)],
                                                       weight_cosines(input, l), centres);
                      },
                      {.refit = true});
}

const RegisterMethod method{{.name = "mergemoe",
                             .summary = "average by weight likeness, down matrices refitted in closed form",
                             .paper = "2510.14436",
                             .slots = "shared",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kInputs,
                             .train_free = true,
                             .compresses = true,
                             .merges = true}};

}  // namespace
}  // namespace lightmoe
