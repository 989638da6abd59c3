#include "compress/selection.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "compress/expert_scores.h"
#include "compress/text.h"

namespace lightmoe {

SelectionRule parse_selection_rule(std::string_view name) {
  if (name == "adaptive") return SelectionRule::kAdaptive;
  if (name == "average") return SelectionRule::kAverage;
  if (name == "uniform") return SelectionRule::kUniform;
  fail(ErrorKind::kUsage, "selection \"{}\": expected adaptive, average or uniform", name);
}

StarvedPolicy parse_starved_policy(std::string_view name) {
  if (name == "unimportant") return StarvedPolicy::kUnimportant;
  if (name == "keep") return StarvedPolicy::kKeep;
  if (name == "error") return StarvedPolicy::kError;
  fail(ErrorKind::kUsage, "starved \"{}\": expected unimportant, keep or error", name);
}

Importance parse_importance(std::string_view name) {
  for (const Importance known : {Importance::kGate, Importance::kReap, Importance::kTaylor}) {
    if (name == name_of(known)) return known;
  }
  fail(ErrorKind::kUsage, "importance \"{}\": expected gate, reap or taylor", name);
}

const char* name_of(Importance importance) {
  constexpr const char* kNames[] = {"gate", "reap", "taylor"};
  return kNames[static_cast<int>(importance)];
}

std::vector<double> gate_scores(const LayerStatistics& layer) { return importance_scores(layer, Importance::kGate); }

std::vector<double> importance_scores(const LayerStatistics& layer, Importance importance) {
  std::vector<double> scores = layer.gate_mass;
  if (importance == Importance::kTaylor) scores = layer.taylor.empty() ? std::vector(scores.size(), 0.0) : layer.taylor;
  if (importance == Importance::kReap) scores = expert_scores(layer, {.mean = 1, .gate = 1, .norm = 1});
  const double sum = std::accumulate(scores.begin(), scores.end(), 0.0);
  for (double& g : scores) g = sum > 0 ? g / sum : 1.0 / static_cast<double>(scores.size());
  return scores;
}

std::vector<double> norm_factors(const Statistics& statistics) {
  std::vector<double> norms;
  for (const LayerStatistics& layer : statistics.layers) norms.push_back(layer.logit_norm);
  const double mean = std::accumulate(norms.begin(), norms.end(), 0.0) / static_cast<double>(norms.size());
  for (double& n : norms) n = mean > 0 ? n / mean : 1.0;
  return norms;
}

double layer_threshold(double p, double norm, const SelectionOptions& options) {
  if (options.rule != SelectionRule::kAdaptive) return p;
  return std::clamp(p * std::exp(-options.alpha * (norm - 1)), (1 - options.clip) * p, (1 + options.clip) * p);
}

namespace {

// One layer's slots that may be replaced, by ascending G.
struct Candidates {
  std::vector<int32_t> slots;
  std::vector<double> cumulative;  // sum of G of the first i + 1
};

std::vector<Candidates> candidates_of(const Statistics& statistics, const SelectionOptions& options) {
  const StarvedPolicy policy = options.starved;
  const auto starved = starved_slots(statistics);
  std::vector<Candidates> layers;
  for (size_t l = 0; l < statistics.layers.size(); ++l) {
    check(policy != StarvedPolicy::kError || starved[l].empty(), ErrorKind::kNumeric,
          "layer {}: no calibration token reached experts {}; calibrate on more data, or say --starved keep or "
          "unimportant",
          l, joined(starved[l]));
    const std::vector<double> scores = importance_scores(statistics.layers[l], options.importance);
    Candidates& c = layers.emplace_back();
    for (int64_t e = 0; e < statistics.num_slots; ++e) {
      const bool is_starved = statistics.layers[l].count[static_cast<size_t>(e)] == 0;
      if (!(policy == StarvedPolicy::kKeep && is_starved)) c.slots.push_back(static_cast<int32_t>(e));
    }
    const auto score = [&](int32_t slot) { return scores[static_cast<size_t>(slot)]; };
    std::stable_sort(c.slots.begin(), c.slots.end(), [&](int32_t a, int32_t b) { return score(a) < score(b); });
    double sum = 0;
    for (const int32_t slot : c.slots) c.cumulative.push_back(sum += score(slot));
  }
  return layers;
}

// Length of the shortest prefix whose cumulative score exceeds the threshold (everything if none does), 0 if that saves nothing.
int64_t prefix_length(const Candidates& c, double threshold, const ReplacementCost& cost) {
  const auto above = std::upper_bound(c.cumulative.begin(), c.cumulative.end(), threshold);
  const auto n = static_cast<int64_t>(above - c.cumulative.begin()) + (above == c.cumulative.end() ? 0 : 1);
  return cost.saves(n) ? n : 0;
}

using Counts = std::vector<int64_t>;

Counts counts_by_threshold(const std::vector<Candidates>& layers, const std::vector<double>& norms,
                           const SelectionOptions& options, const ReplacementCost& cost, double p) {
  Counts counts;
  for (size_t l = 0; l < layers.size(); ++l) {
    counts.push_back(prefix_length(layers[l], layer_threshold(p, norms[l], options), cost));
  }
  return counts;
}

int64_t total_parameters(const Counts& counts, const ReplacementCost& cost) {
  int64_t sum = cost.size.rest;
  for (const int64_t n : counts) sum += cost.layer_parameters(n);
  return sum;
}

Selection make_selection(const std::vector<Candidates>& layers, const Counts& counts) {
  Selection selection;
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto& slots = layers[l].slots;
    selection.replaced.emplace_back(slots.begin(), slots.begin() + counts[l]);
  }
  selection.thresholds.assign(layers.size(), 0.0);
  return selection;
}

Selection select_uniform(const std::vector<Candidates>& layers, const ReplacementCost& cost, int64_t target) {
  for (int64_t n = 0; n <= cost.size.slots; ++n) {
    Counts counts;
    for (const Candidates& c : layers) {
      const int64_t possible = std::min(n, static_cast<int64_t>(c.slots.size()));
      counts.push_back(cost.saves(possible) ? possible : 0);
    }
    if (total_parameters(counts, cost) <= target) return make_selection(layers, counts);
  }
  fail(ErrorKind::kUsage, "the budget cannot be met without replacing experts that no token reached (--starved keep)");
}

}  // namespace

Selection select_by_threshold(const Statistics& statistics, const SelectionOptions& options,
                              const ReplacementCost& cost, double p) {
  const std::vector<Candidates> layers = candidates_of(statistics, options);
  const std::vector<double> norms = norm_factors(statistics);
  Selection selection = make_selection(layers, counts_by_threshold(layers, norms, options, cost, p));
  selection.base_threshold = p;
  for (size_t l = 0; l < layers.size(); ++l) selection.thresholds[l] = layer_threshold(p, norms[l], options);
  return selection;
}

Selection select_slots(const Statistics& statistics, const SelectionOptions& options, const ReplacementCost& cost,
                       int64_t target) {
  check(options.alpha >= 0 && options.clip >= 0 && options.clip < 1, ErrorKind::kUsage,
        "alpha {:g}, clip {:g}: expected alpha >= 0 and 0 <= clip < 1", options.alpha, options.clip);
  const std::vector<Candidates> layers = candidates_of(statistics, options);
  if (total_parameters(Counts(layers.size(), 0), cost) <= target) {
    return make_selection(layers, Counts(layers.size(), 0));
  }
  if (options.rule == SelectionRule::kUniform) return select_uniform(layers, cost, target);
  const std::vector<double> norms = norm_factors(statistics);
  const auto fits = [&](double p) {
    return total_parameters(counts_by_threshold(layers, norms, options, cost, p), cost) <= target;
  };
  double low = 0, high = 2 / (1 - options.clip);  // at high every layer's threshold is past 1: everything goes
  check(fits(high), ErrorKind::kUsage,
        "the budget cannot be met without replacing experts that no token reached (--starved keep)");
  for (int i = 0; i < 200 && high - low > 0; ++i) {
    const double middle = low + (high - low) / 2;
    if (middle <= low || middle >= high) break;  // neighbours in double: the exact border
    (fits(middle) ? high : low) = middle;
  }
  return select_by_threshold(statistics, options, cost, high);
}

std::vector<SlotGroup> group_slots(const std::vector<int32_t>& replaced, const std::vector<double>& scores,
                                   const std::vector<double>& similarity, int64_t bases) {
  require(bases > 0, "group_slots: no bases");
  const size_t slots = scores.size(), count = std::min(replaced.size(), static_cast<size_t>(bases));
  const auto score = [&](int32_t slot) { return scores[static_cast<size_t>(slot)]; };
  std::vector<int32_t> order = replaced;
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return score(a) != score(b) ? score(a) > score(b) : a < b; });
  std::vector<SlotGroup> groups(count);
  for (size_t g = 0; g < count; ++g) groups[g].slots.push_back(order[g]);
  for (size_t i = count; i < order.size(); ++i) {
    size_t best = i % count;
    if (!similarity.empty()) {
      const double* row = &similarity[static_cast<size_t>(order[i]) * slots];
      best = 0;
      for (size_t g = 1; g < count; ++g) {
        if (row[groups[g].slots[0]] > row[groups[best].slots[0]]) best = g;
      }
    }
    groups[best].slots.push_back(order[i]);
  }
  for (SlotGroup& group : groups) {
    double sum = 0;
    for (const int32_t slot : group.slots) sum += score(slot);
    for (const int32_t slot : group.slots) {
      group.weights.push_back(sum > 0 ? score(slot) / sum : 1.0 / static_cast<double>(group.slots.size()));
    }
  }
  return groups;
}

}  // namespace lightmoe
