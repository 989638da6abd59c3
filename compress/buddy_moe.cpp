// BuddyMoE (arXiv 2511.10054): when an expert is not resident, another one that is chosen together with it answers instead.
//   per expert a list of buddies by co-activation counts;  on a miss the best resident buddy runs with the missing expert's gate.
// Published (a note): for off-loaded experts at run time: lists cut at cumulative 0.95, at most three substitutions a token, no buddy twice,
// conditions on the router's confidence. Ours is its fixed form, as a slot table: the most used experts of each layer are resident, as
// many as the budget says, and every other slot points to the resident slot it is chosen together with most often (ties and pairs
// never seen together: the most used). Gates add up where a token chose both. The run-time form, with lists and conditions, is
// model/buddies.h.

#include <algorithm>
#include <numeric>

#include "compress/buddy_lists.h"
#include "compress/expert_budget.h"

namespace lightmoe {
namespace {

Plan plan(const MethodInput& input) {
  const auto resident = static_cast<size_t>(experts_per_layer(input, 1));
  const int64_t slots = input.config.num_experts;
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    const std::vector<double>& use = input.statistics.layers[static_cast<size_t>(l)].count;
    const std::vector<double> together = coactivations(input.statistics, l, input.config.num_experts_per_token);
    std::vector<int32_t> order(static_cast<size_t>(slots));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return use[static_cast<size_t>(a)] > use[static_cast<size_t>(b)]; });
    std::vector<PlannedExpert> experts;
    for (size_t r = 0; r < resident; ++r) experts.push_back({{order[r]}, {{order[r]}, {1.0}}});
    for (size_t i = resident; i < order.size(); ++i) {
      const double* row = &together[static_cast<size_t>(order[i]) * static_cast<size_t>(slots)];
      const auto buddy = std::max_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(resident),
                                          [row](int32_t a, int32_t b) { return row[a] < row[b]; });
      experts[static_cast<size_t>(buddy - order.begin())].slots.push_back(order[i]);
    }
    plan.layers.push_back(table_plan(slots, std::move(experts)));
  }
  return plan;
}

const RegisterMethod method{{.name = "buddy-moe",
                             .summary = "absent experts are answered for by the resident one they are chosen with",
                             .paper = "2511.10054",
                             .slots = "shared",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kInputs,
                             .train_free = true,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
