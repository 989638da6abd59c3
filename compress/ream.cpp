// REAM, router-weighted expert merging (arXiv 2604.04356; code SamsungSAILMontreal/ream): merge into the salient, then prune the rest.
//   1. saliency = REAP's score; the N' most salient are centroids.  2. likeness of i, j = mean of (cosine + 1) / 2 of their gate-weighted
//   outputs over all sampled tokens and 1 - dist / max dist of unit-norm router-logit columns.  3. from the most salient centroid on,
//   each absorbs its closest unassigned non-centroids until its group has 16: a few large groups, many untouched.  4. members are aligned
//   to the centroid (assignment of least cost) and averaged by saliency.  5. router rows of non-centroids go, as in pruning.
// Published: 1-5, and layers one after the other with outputs recomputed. Our reading: gate-weighted = the full softmax probability times
// the output, cosine per token, averaged. With --redirect step 5 is left out: absorbed slots keep their router rows and point to the
// merged expert, whose gates add up; the few that found no place point to the centroid most like them. Ours. Changed: alignment by
// weights alone (published: hidden activations as well), layers independent of each other (the sample is of the original model).

#include <algorithm>
#include <cmath>

#include "compress/expert_budget.h"
#include "compress/expert_scores.h"
#include "compress/merging.h"
#include "compress/pruning.h"

namespace lightmoe {
namespace {

constexpr size_t kGroupSize = 16;
constexpr int64_t kTokens = 512;

// Mean over tokens of the cosine of outputs. The positive gate factor of a token cancels in its cosine.
std::vector<double> output_cosines(const MethodInput& input, int64_t layer) {
  const LayerSample sample = layer_sample(input, layer, kTokens);
  const auto n = static_cast<size_t>(input.config.num_experts), d = static_cast<size_t>(input.config.hidden_size);
  std::vector<Tensor> outputs;
  for (size_t e = 0; e < n; ++e) {
    const ExpertMatrices expert = read_expert(*input.experts, layer, static_cast<int64_t>(e));
    outputs.push_back(expert_output(expert, expert_hidden(expert, sample.x)));
  }
  std::vector<double> sum(n * n, 0.0);
  const auto dot = [&](size_t i, size_t j, int64_t t) {
    const float *x = outputs[i].row(t).data<float>(), *y = outputs[j].row(t).data<float>();
    double s = 0;
    for (size_t k = 0; k < d; ++k) s += static_cast<double>(x[k]) * static_cast<double>(y[k]);
    return s;
  };
  for (int64_t t = 0; t < sample.tokens(); ++t) {
    std::vector<double> norms(n);
    for (size_t i = 0; i < n; ++i) norms[i] = std::sqrt(dot(i, i, t));
    for (size_t i = 0; i < n; ++i) {
      for (size_t j = 0; j < i; ++j) {
        const double norm = norms[i] * norms[j];
        sum[i * n + j] += norm > 0 ? dot(i, j, t) / norm : 0;
      }
    }
  }
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < i; ++j) {
      sum[j * n + i] = sum[i * n + j] /= static_cast<double>(std::max<int64_t>(1, sample.tokens()));
    }
  }
  return sum;
}

std::vector<double> logit_distances(const MethodInput& input, int64_t layer) {
  const std::vector<float>& logits = input.statistics.layers[static_cast<size_t>(layer)].sample_logits;
  const auto n = static_cast<size_t>(input.config.num_experts), tokens = logits.size() / n;
  std::vector<double> columns(n * tokens);  // unit-norm, one per expert
  for (size_t e = 0; e < n; ++e) {
    double squares = 0;
    for (size_t t = 0; t < tokens; ++t) {
      columns[e * tokens + t] = static_cast<double>(logits[t * n + e]);
      squares += columns[e * tokens + t] * columns[e * tokens + t];
    }
    for (size_t t = 0; t < tokens && squares > 0; ++t) columns[e * tokens + t] /= std::sqrt(squares);
  }
  std::vector<double> d(n * n, 0.0);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < i; ++j) {
      double sum = 0;
      for (size_t t = 0; t < tokens; ++t) {
        const double x = columns[i * tokens + t] - columns[j * tokens + t];
        sum += x * x;
      }
      d[i * n + j] = d[j * n + i] = std::sqrt(sum);
    }
  }
  return d;
}

std::vector<double> likeness(const MethodInput& input, int64_t layer) {
  std::vector<double> value = output_cosines(input, layer);
  const std::vector<double> distances = logit_distances(input, layer);
  const double largest = *std::max_element(distances.begin(), distances.end());
  for (size_t i = 0; i < value.size(); ++i) {
    value[i] = .5 * ((value[i] + 1) / 2 + (largest > 0 ? 1 - distances[i] / largest : 1));
  }
  return value;
}

// Groups, the centroid first.
std::vector<SlotGroup> groups_of(const std::vector<double>& saliency, const std::vector<double>& like, size_t count) {
  const size_t n = saliency.size();
  const std::vector<int32_t> order = by_descending_score(saliency);
  std::vector<int32_t> left(order.begin() + static_cast<std::ptrdiff_t>(count), order.end());
  std::sort(left.begin(), left.end());
  std::vector<SlotGroup> groups;
  for (size_t g = 0; g < count; ++g) {
    SlotGroup group{.slots = {order[g]}, .weights = {}};
    const double* row = like.empty() ? nullptr : &like[static_cast<size_t>(order[g]) * n];
    while (!left.empty() && group.slots.size() < kGroupSize) {
      auto best = left.begin();
      if (row != nullptr) {
        best = std::max_element(left.begin(), left.end(), [row](int32_t a, int32_t b) { return row[a] < row[b]; });
      }
      group.slots.push_back(*best);
      left.erase(best);
    }
    double sum = 0;
    for (const int32_t slot : group.slots) sum += saliency[static_cast<size_t>(slot)];
    for (const int32_t slot : group.slots) {
      group.weights.push_back(sum > 0 ? saliency[static_cast<size_t>(slot)] / sum
                                      : 1 / static_cast<double>(group.slots.size()));
    }
    groups.push_back(std::move(group));
  }
  return groups;  // those that found no place (more than 16 times the centroids) go with their rows
}

// Slots of each group's expert: the centroid alone, or all that it stands for.
std::vector<std::vector<int32_t>> slots_of(const std::vector<SlotGroup>& groups, const std::vector<double>& like,
                                           size_t slots, bool redirect) {
  std::vector<std::vector<int32_t>> of_group;
  std::vector<uint8_t> placed(slots, 0);
  for (const SlotGroup& group : groups) {
    of_group.push_back(redirect ? group.slots : std::vector{group.slots[0]});
    for (const int32_t slot : group.slots) placed[static_cast<size_t>(slot)] = 1;
  }
  for (size_t s = 0; redirect && s < slots; ++s) {
    if (placed[s]) continue;
    size_t best = 0;
    for (size_t g = 1; g < groups.size() && !like.empty(); ++g) {
      const auto likeness_to = [&](size_t k) { return like[s * slots + static_cast<size_t>(groups[k].slots[0])]; };
      if (likeness_to(g) > likeness_to(best)) best = g;
    }
    of_group[best].push_back(static_cast<int32_t>(s));
  }
  return of_group;
}

Plan plan(const MethodInput& input) {
  const int64_t slots = input.config.num_experts, kept = experts_per_layer(input, least_survivors(input));
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    std::vector<double> like;
    if (kept < slots && input.experts != nullptr) like = likeness(input, l);
    const std::vector<double> saliency =
        expert_scores(input.statistics.layers[static_cast<size_t>(l)], {.mean = 1, .gate = 1, .norm = 1});
    std::vector<PlannedExpert> experts;
    const std::vector<SlotGroup> groups = groups_of(saliency, like, static_cast<size_t>(kept));
    const auto of_group = slots_of(groups, like, static_cast<size_t>(slots), input.options.redirect);
    for (size_t g = 0; g < groups.size(); ++g) {
      const bool alone = groups[g].slots.size() == 1;
      experts.push_back({of_group[g], {groups[g].slots, alone ? std::vector{1.0} : groups[g].weights}});
    }
    plan.layers.push_back(table_plan(slots, std::move(experts)));
    compute_merged(plan, input, l, {.align = true, .refit = input.options.refit});
  }
  return plan;
}

const RegisterMethod method{{.name = "ream",
                             .summary = "the salient experts absorb those like them, then the others are removed",
                             .paper = "2604.04356",
                             .slots = "removed",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kInputs,
                             .train_free = true,
                             .compresses = true,
                             .redirects = true,
                             .merges = true}};

}  // namespace
}  // namespace lightmoe
