#include "compress/merging.h"

#include <algorithm>
#include <numeric>

#include "compress/assignment.h"
#include "compress/linear_algebra.h"

namespace lightmoe {
namespace {

constexpr double kRidge = 1e-2;

void add_scaled(const Tensor& sum, const Tensor& w, double scale) {
  double* to = sum.data<double>();
  const double* from = w.data<double>();
  for (int64_t i = 0; i < sum.numel(); ++i) to[i] += scale * from[i];
}

// Rows (or columns) of a matrix in another order.
Tensor reordered(const Tensor& w, const std::vector<int32_t>& order, bool columns) {
  const int64_t m = w.dim(0), n = w.dim(1);
  const Tensor y = Tensor::empty(w.shape(), DType::kF64);
  for (int64_t i = 0; i < m; ++i) {
    const double* from = w.data<double>() + (columns ? i : order[static_cast<size_t>(i)]) * n;
    for (int64_t j = 0; j < n; ++j) {
      y.data<double>()[i * n + j] = from[columns ? order[static_cast<size_t>(j)] : j];
    }
  }
  return y;
}

// The down matrix of least squares, drawn towards what it is.
Tensor refitted_down(const MethodInput& input, int64_t layer, const BankEntry& group, const ExpertMatrices& merged) {
  const Tensor x = routed_rows(layer_sample(input, layer), group.experts).to(DType::kF64);
  if (x.dim(0) == 0) return merged.down;
  const Tensor p = expert_hidden(merged, x), q = Tensor::zeros({x.dim(0), x.dim(1)}, DType::kF64);
  for (size_t i = 0; i < group.experts.size(); ++i) {
    const ExpertMatrices member = read_expert(*input.experts, layer, group.experts[i], DType::kF64);
    add_scaled(q, expert_output(member, expert_hidden(member, x)), group.weights[i]);
  }
  const Tensor gram = product(p, true, p, false), ridged = with_ridge(gram, kRidge);
  const double lambda = ridged.data<double>()[0] - gram.data<double>()[0];
  const Tensor right = product(p, true, q, false);  // [F,D]
  add_scaled(right, transpose(merged.down), lambda);
  return transpose(cholesky_solve(cholesky(ridged), right));
}

}  // namespace

std::vector<int32_t> aligned_units(const ExpertMatrices& to, const ExpertMatrices& from) {
  const Tensor gain = product(to.gate, false, from.gate, true);
  add_scaled(gain, product(to.up, false, from.up, true), 1);
  add_scaled(gain, product(to.down, true, from.down, false), 1);
  std::vector<double> cost(gain.data<double>(), gain.data<double>() + gain.numel());
  for (double& c : cost) c = -c;
  return cheapest_assignment(cost, gain.dim(0));
}

ExpertMatrices with_units(const ExpertMatrices& expert, const std::vector<int32_t>& order) {
  return {.gate = reordered(expert.gate, order, false),
          .up = reordered(expert.up, order, false),
          .down = reordered(expert.down, order, true)};
}

ExpertMatrices merged_expert(const MethodInput& input, int64_t layer, const BankEntry& group,
                             const MergeOptions& options) {
  ExpertMatrices centre, sum;
  for (size_t i = 0; i < group.experts.size(); ++i) {
    ExpertMatrices member = read_expert(*input.experts, layer, group.experts[i], DType::kF64);
    if (i == 0) {
      centre = member;
      const auto zeros = [](const Tensor& like) { return Tensor::zeros(like.shape(), DType::kF64); };
      sum = {.gate = zeros(member.gate), .up = zeros(member.up), .down = zeros(member.down)};
    } else if (options.align) {
      member = with_units(member, aligned_units(centre, member));
    }
    add_scaled(sum.gate, member.gate, group.weights[i]);
    add_scaled(sum.up, member.up, group.weights[i]);
    add_scaled(sum.down, member.down, group.weights[i]);
  }
  if (options.refit) sum.down = refitted_down(input, layer, group, sum);
  return sum;
}

Plan plan_merging(const MethodInput& input, const GroupFunction& groups, const MergeOptions& options) {
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    std::vector<PlannedExpert> experts;
    for (const SlotGroup& group : groups(l)) {
      experts.push_back({group.slots, {group.slots, group.slots.size() == 1 ? std::vector{1.0} : group.weights}});
    }
    plan.layers.push_back(table_plan(input.config.num_experts, std::move(experts)));
    compute_merged(plan, input, l, options);
  }
  return plan;
}

void compute_merged(Plan& plan, const MethodInput& input, int64_t layer, const MergeOptions& options) {
  if (!options.align && !options.refit) return;
  const std::vector<BankEntry>& bank = plan.layers[static_cast<size_t>(layer)].bank;
  for (size_t j = 0; j < bank.size(); ++j) {
    if (bank[j].experts.size() < 2) continue;
    compute_expert(plan, layer, static_cast<int64_t>(j),
                   [input, layer, group = bank[j], options] { return merged_expert(input, layer, group, options); });
  }
}

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

}  // namespace

GroupFunction m_smoe_groups(const MethodInput& input, int64_t total) {
  return [&input, counts = groups_per_layer(input, total)](int64_t l) {
    const auto layer = static_cast<size_t>(l);
    return groups_around_most_used(input.statistics.layers[layer], logit_similarity(input.statistics, l),
                                   counts[layer]);
  };
}

SlotGroup group_by_use(const LayerStatistics& layer, const std::vector<int32_t>& slots) {
  SlotGroup group{.slots = slots, .weights = {}};
  double sum = 0;
  for (const int32_t slot : slots) sum += layer.count[static_cast<size_t>(slot)];
  for (const int32_t slot : slots) {
    group.weights.push_back(sum > 0 ? layer.count[static_cast<size_t>(slot)] / sum
                                    : 1 / static_cast<double>(slots.size()));
  }
  return group;
}

std::vector<SlotGroup> groups_around_most_used(const LayerStatistics& layer, const std::vector<double>& similarity,
                                               int64_t centres) {
  const size_t slots = layer.count.size(), count = std::min(slots, static_cast<size_t>(centres));
  std::vector<int32_t> order(slots);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return layer.count[static_cast<size_t>(a)] > layer.count[static_cast<size_t>(b)];
  });
  std::vector<std::vector<int32_t>> members(count);
  for (size_t g = 0; g < count; ++g) members[g].push_back(order[g]);
  std::vector<int32_t> others(order.begin() + static_cast<std::ptrdiff_t>(count), order.end());
  std::sort(others.begin(), others.end());
  for (size_t i = 0; i < others.size(); ++i) {
    size_t best = i % count;
    if (!similarity.empty()) {
      const double* row = &similarity[static_cast<size_t>(others[i]) * slots];
      best = 0;
      for (size_t g = 1; g < count; ++g) {
        if (row[members[g][0]] > row[members[best][0]]) best = g;
      }
    }
    members[best].push_back(others[i]);
  }
  std::vector<SlotGroup> groups;
  for (const auto& slots_of_group : members) groups.push_back(group_by_use(layer, slots_of_group));
  return groups;
}

}  // namespace lightmoe
