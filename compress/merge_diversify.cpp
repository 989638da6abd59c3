// Diversifying the expert knowledge (arXiv 2407.09590): experts that represent inputs alike are merged, and so are their router rows.
//   likeness = linear CKA of the experts' outputs Y_i [N,D] on the same inputs, centred:  <K_i, K_j> / (||K_i|| ||K_j||),  K = Y Y^T;
//   the graph is cut into r groups;  experts and router rows of a group are averaged with the same coefficients.
// Published (a note): the above, coefficients uniform, by the largest, or learned; a weight surrogate instead of CKA. Our reading: uniform
// coefficients; average linkage on 1 - CKA cuts the graph; the same r in every layer. One slot of a group stays, with the mean row; the
// others are removed, so the model keeps the stock shape. With --redirect they are not: the group's slots point to its expert, gates add up
// and router rows stay as they are (their mean would count them twice). Ours. Changed: at most 256 sampled tokens.

#include <cmath>

#include "compress/clustering.h"
#include "compress/expert_budget.h"
#include "compress/expert_sample.h"
#include "compress/linear_algebra.h"
#include "compress/merging.h"
#include "compress/pruning.h"
#include "compress/weights.h"

namespace lightmoe {
namespace {

constexpr int64_t kTokens = 256;

// Centred Gram matrices of the outputs, one per row, unit length: their products are the CKA.
std::vector<double> cka_distances(const MethodInput& input, int64_t layer) {
  const int64_t experts = input.config.num_experts;
  std::vector<double> distances(static_cast<size_t>(experts * experts), 0.0);
  if (input.experts == nullptr) return distances;  // arithmetic only
  const LayerSample sample = layer_sample(input, layer, kTokens);
  const int64_t n = sample.tokens(), d = input.config.hidden_size;
  const Tensor grams = Tensor::zeros({experts, n * n}, DType::kF64);
  for (int64_t e = 0; e < experts; ++e) {
    const ExpertMatrices expert = read_expert(*input.experts, layer, e);
    const Tensor y = expert_output(expert, expert_hidden(expert, sample.x)).to(DType::kF64);
    for (int64_t i = 0; i < d; ++i) {
      double mean = 0;
      for (int64_t t = 0; t < n; ++t) mean += y.data<double>()[t * d + i] / static_cast<double>(n);
      for (int64_t t = 0; t < n; ++t) y.data<double>()[t * d + i] -= mean;
    }
    const Tensor gram = product(y, false, y, true);
    double squares = 0;
    for (int64_t i = 0; i < n * n; ++i) squares += gram.data<double>()[i] * gram.data<double>()[i];
    const double scale = squares > 0 ? 1 / std::sqrt(squares) : 0;
    for (int64_t i = 0; i < n * n; ++i) grams.data<double>()[e * n * n + i] = gram.data<double>()[i] * scale;
  }
  const Tensor cka = product(grams, false, grams, true);
  for (size_t i = 0; i < distances.size(); ++i) distances[i] = 1 - cka.data<double>()[i];
  return distances;
}

// The router with every group's mean row at its first slot.
Tensor merged_router(const MethodInput& input, int64_t layer, const Clusters& groups) {
  const Tensor rows = input.experts->router(layer).read(DType::kF64), out = rows.clone();
  const int64_t d = rows.dim(1);
  for (const auto& group : groups) {
    double* to = out.row(group[0]).data<double>();
    std::fill(to, to + d, 0.0);
    for (const int32_t slot : group) {
      for (int64_t i = 0; i < d; ++i) to[i] += rows.row(slot).data<double>()[i] / static_cast<double>(group.size());
    }
  }
  return out;
}

Plan plan(const MethodInput& input) {
  const int64_t slots = input.config.num_experts, kept = experts_per_layer(input, least_survivors(input));
  if (kept == slots) return plain_plan(model_size(input.config));
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    const Clusters groups = average_linkage(cka_distances(input, l), slots, kept);
    std::vector<PlannedExpert> experts;
    for (const auto& group : groups) {
      const std::vector<double> weights(group.size(), 1 / static_cast<double>(group.size()));
      experts.push_back({input.options.redirect ? group : std::vector{group[0]}, {group, weights}});
    }
    plan.layers.push_back(table_plan(slots, std::move(experts)));
    compute_merged(plan, input, l, {.refit = input.options.refit});
    if (input.options.redirect) continue;
    plan.computed[fmt::format("model.layers.{}.mlp.gate.weight", l)] = [input, l, groups] {
      return merged_router(input, l, groups);
    };
  }
  return plan;
}

const RegisterMethod method{{.name = "diversify",
                             .summary = "groups of like outputs (CKA), experts and router rows averaged alike",
                             .paper = "2407.09590",
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
