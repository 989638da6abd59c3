// ConMoE (arXiv 2605.29350): some experts stay as prototypes, unchanged, and every slot points to its nearest one.
//   pool = the experts of one or several neighbouring layers (scope);  per expert e:
//     a_e = mean of g_e ||e(x)|| over its tokens (REAP's score);   d(e,e') = 1/3 sum over gate, up, down of 2 ||W - W'|| / (||W|| + ||W'||)
//     b_e = min over e' of d(e,e');   score = a b after min-max over the pool;  prototypes = the K best;  slot e points to the nearest
//   A token's gates of slots with one prototype add up; the router stays.
// Published: the above, evaluated on copies (the saving was only counted). Our reading: the model's own gates; K = budget / scopes.
// Changed: nothing in the choice. Here the saving is physical: a prototype is stored once, by the lowest layer of its scope that uses
// it, and other layers' banks refer to it. Adapters that recovery adds to a prototype of several layers stay (they differ by layer).
// Ties go to the lower expert. Memory: one kind of matrix of the pool passes in blocks of 64 rows.

#include <algorithm>
#include <cmath>
#include <limits>

#include "compress/expert_budget.h"
#include "compress/expert_sample.h"
#include "compress/expert_scores.h"
#include "compress/pruning.h"

namespace lightmoe {
namespace {

std::vector<double> min_max(std::vector<double> values) {
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  const double from = *low, range = *high - *low;
  for (double& v : values) v = range > 0 ? (v - from) / range : 1;
  return values;
}

// The pool of one scope: experts of layers [first, last), ordered by layer, then expert.
class Pool {
 public:
  Pool(const MethodInput& input, int64_t first, int64_t last) : input_(input) {
    for (int64_t l = first; l < last; ++l) {
      for (int64_t e = 0; e < input.config.num_experts; ++e) experts_.push_back({l, e});
    }
    distances_.assign(size() * size(), 0.0);
    if (input.experts == nullptr) return;  // arithmetic only
    for (const ExpertMatrix matrix : kExpertMatrices) add_distances(matrix);
  }

  size_t size() const { return experts_.size(); }
  const ExpertId& operator[](size_t i) const { return experts_[i]; }

  std::vector<size_t> prototypes(size_t count) const {
    std::vector<double> contribution, replaceability;
    for (size_t i = 0; i < size(); ++i) {
      const ExpertId& id = experts_[i];
      const LayerStatistics& layer = input_.statistics.layers[static_cast<size_t>(id.layer)];
      contribution.push_back(expert_scores(layer, {.mean = 1, .gate = 1, .norm = 1})[static_cast<size_t>(id.expert)]);
      double nearest = std::numeric_limits<double>::infinity();
      for (size_t j = 0; j < size(); ++j) {
        if (j != i) nearest = std::min(nearest, distances_[i * size() + j]);
      }
      replaceability.push_back(std::isfinite(nearest) ? nearest : 0);
    }
    contribution = min_max(contribution), replaceability = min_max(replaceability);
    for (size_t i = 0; i < size(); ++i) contribution[i] *= replaceability[i];
    std::vector<size_t> order(size());
    for (size_t i = 0; i < size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return contribution[a] > contribution[b]; });
    order.resize(std::min(count, size()));
    std::sort(order.begin(), order.end());
    return order;
  }

  // The nearest of the prototypes; a prototype is its own.
  size_t nearest(size_t expert, const std::vector<size_t>& prototypes) const {
    if (std::binary_search(prototypes.begin(), prototypes.end(), expert)) return expert;
    return *std::min_element(prototypes.begin(), prototypes.end(), [&](size_t a, size_t b) {
      return distances_[expert * size() + a] < distances_[expert * size() + b];
    });
  }

 private:
  void add_distances(ExpertMatrix matrix) {
    const std::vector<double> products = expert_products(*input_.experts, input_.config, experts_, matrix);
    const size_t n = size();
    for (size_t i = 0; i < n; ++i) {
      for (size_t j = 0; j < n; ++j) {
        const double ii = products[i * n + i], jj = products[j * n + j];
        const double norms = std::sqrt(ii) + std::sqrt(jj);
        const double apart = std::sqrt(std::max(0.0, ii + jj - 2 * products[i * n + j]));
        if (i != j && norms > 0) distances_[i * n + j] += 2 * apart / norms / 3;
      }
    }
  }

  const MethodInput& input_;
  std::vector<ExpertId> experts_;
  std::vector<double> distances_;
};

// The layers of one scope, appended to the plan.
void plan_scope(const MethodInput& input, const Pool& pool, size_t count, int64_t first, int64_t last, Plan& plan) {
  const std::vector<size_t> prototypes = pool.prototypes(count);
  std::vector<BankRef> owner(pool.size());  // per prototype, who stores it
  const auto slots = static_cast<size_t>(input.config.num_experts);
  for (int64_t l = first; l < last; ++l) {
    std::vector<std::vector<int32_t>> users(pool.size());
    const size_t base = static_cast<size_t>(l - first) * slots;
    for (size_t s = 0; s < slots; ++s) users[pool.nearest(base + s, prototypes)].push_back(static_cast<int32_t>(s));
    std::vector<PlannedExpert> experts;
    for (size_t p = 0; p < users.size(); ++p) {
      if (users[p].empty()) continue;
      const ExpertId& id = pool[p];
      const BankEntry copy{.experts = {static_cast<int32_t>(id.expert)},
                           .weights = {1.0},
                           .layer = id.layer == l ? -1 : static_cast<int32_t>(id.layer)};
      experts.push_back({users[p], copy});
    }
    LayerPlan layer = table_plan(input.config.num_experts, std::move(experts));
    layer.shape.borrowed.resize(layer.bank.size());
    for (size_t j = 0; j < layer.bank.size(); ++j) {
      const BankEntry& entry = layer.bank[j];
      const int64_t from = entry.layer >= 0 ? entry.layer : l;
      BankRef& stored = owner[static_cast<size_t>(from - first) * slots + static_cast<size_t>(entry.experts[0])];
      if (stored.layer >= 0)
        layer.shape.borrowed[j] = stored;
      else
        stored = {static_cast<int32_t>(l), static_cast<int32_t>(j)};
    }
    plan.layers.push_back(std::move(layer));
  }
}

Plan plan_conmoe(const MethodInput& input, int64_t scope) {
  const int64_t layers = input.config.num_layers;
  check(scope <= layers, ErrorKind::kUsage, "conmoe with a scope of {} layers: the model has {}", scope, layers);
  const int64_t all = experts_in_all(input, 1);
  Plan plan;
  for (int64_t first = 0; first < layers; first += scope) {
    const int64_t last = std::min(first + scope, layers);  // the last scope may be shorter
    const Pool pool(input, first, last);
    plan_scope(input, pool, static_cast<size_t>(all * (last - first) / layers), first, last, plan);
  }
  return plan;
}

template <int64_t kScope>
Plan plan_with_scope(const MethodInput& input) {
  return plan_conmoe(input, kScope);
}

Method method(const char* name, const char* summary, Plan (*plan)(const MethodInput&)) {
  return {.name = name,
          .summary = summary,
          .paper = "2605.29350",
          .slots = "shared",
          .plan = plan,
          .trainable = Trainable::kAdapters,
          .needs = Needs::kSums,
          .train_free = true,
          .compresses = true};
}
const RegisterMethod one{
    method("conmoe", "slots point to the nearest of the kept experts, nothing averaged", &plan_with_scope<1>)};
const RegisterMethod two{
    method("conmoe-2", "ConMoE with prototypes chosen over, and shared by, two layers", &plan_with_scope<2>)};
const RegisterMethod four{
    method("conmoe-4", "ConMoE with prototypes chosen over, and shared by, four layers", &plan_with_scope<4>)};

}  // namespace
}  // namespace lightmoe
