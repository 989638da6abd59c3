#include "compress/budget.h"

#include <algorithm>
#include <cmath>

namespace lightmoe {

ModelSize model_size(const OlmoeConfig& c) {
  const int64_t d = c.hidden_size, q = c.num_heads * c.head_dim(), kv = c.num_kv_heads * c.head_dim();
  const int64_t attention = d * q + 2 * d * kv + q * d + q + kv;  // q, k, v, o and the two norms
  const int64_t layer = attention + 2 * d + c.num_experts * d;    // norms and router
  const int64_t tables = (c.tie_word_embeddings ? 1 : 2) * c.vocab_size * d;
  return {.layers = c.num_layers,
          .slots = c.num_experts,
          .hidden = d,
          .width = c.intermediate_size,
          .expert = 3 * d * c.intermediate_size,
          .adapter_unit = 3 * (d + c.intermediate_size),
          .rest = tables + d + c.num_layers * layer};
}

int64_t stored_parameters(const LayerShape& layer, const ModelSize& size) {
  int64_t sum = adapter_parameters(layer, size) + layer.constants * size.hidden;
  for (size_t j = 0; j < layer.zero_expert.size(); ++j)
    sum += layer.stores(j) ? 3 * size.hidden * layer.width_of(j, size.width) : 0;
  sum += extension_parameters(layer.extension, {.hidden = size.hidden, .width = size.width, .slots = size.slots});
  const auto latents = static_cast<int64_t>(layer.latent_projection.size());
  sum += layer.projections * layer.projection_parameters(size.hidden);
  return sum + latents * layer.latent_parameters(size.hidden, size.width);
}

int64_t adapter_parameters(const LayerShape& layer, const ModelSize& size) {
  int64_t sum = 0;
  for (size_t a = 0; a < layer.adapter_rank.size(); ++a) {
    sum += layer.adapter_rank[a] * 3 * (size.hidden + layer.width_of_adapter(a, size.width));
  }
  return sum;
}

int64_t stored_parameters(const std::vector<LayerShape>& layers, const ModelSize& size) {
  int64_t sum = size.rest;
  for (const LayerShape& layer : layers) sum += stored_parameters(layer, size);
  return sum;
}

bool ReplacementCost::saves(int64_t replaced) const {
  const int64_t gone = replaced - std::min(replaced, bases);
  return gone * size.expert > replaced * rank * size.adapter_unit;
}

int64_t ReplacementCost::layer_parameters(int64_t replaced) const {
  const int64_t all = size.slots * size.expert;
  if (!saves(replaced)) return all;
  return all - (replaced - std::min(replaced, bases)) * size.expert + replaced * rank * size.adapter_unit;
}

std::string describe(const Budget& budget) {
  switch (budget.kind) {
    case BudgetKind::kWholeModel:
      return fmt::format("{:g} % of the whole model", 100 * budget.value);
    case BudgetKind::kExperts:
      return fmt::format("{:g} % of the expert weights", 100 * budget.value);
    case BudgetKind::kGib:
      return fmt::format("at most {:g} GiB", budget.value);
    case BudgetKind::kExpertsPerLayer:
      return fmt::format("{:g} stored experts per layer", budget.value);
  }
  return "";
}

int64_t allowed_parameters(const Budget& budget, const ReplacementCost& cost, double bytes_per_parameter) {
  const ModelSize& size = cost.size;
  const double v = budget.value;
  switch (budget.kind) {
    case BudgetKind::kWholeModel:
    case BudgetKind::kExperts: {
      check(v >= 0 && v < 1, ErrorKind::kUsage,
            "ratio {:g}: expected a share from 0 to less than 1 (0.5 halves the model)", v);
      const double removed =
          v * static_cast<double>(budget.kind == BudgetKind::kExperts ? size.all_experts() : size.total());
      return size.total() - std::llround(std::ceil(removed));
    }
    case BudgetKind::kGib:
      check(v > 0 && std::isfinite(v), ErrorKind::kUsage, "target of {:g} GiB: expected a positive number", v);
      return std::llround(std::floor(v * 0x1p30 / bytes_per_parameter));
    case BudgetKind::kExpertsPerLayer: {
      const auto experts = static_cast<int64_t>(v);
      check(static_cast<double>(experts) == v && experts >= std::max<int64_t>(cost.bases, 1) && experts <= size.slots,
            ErrorKind::kUsage, "{:g} stored experts per layer: expected an integer from {} (the bases) to {}", v,
            std::max<int64_t>(cost.bases, 1), size.slots);
      const int64_t replaced = experts == size.slots ? 0 : size.slots - experts + cost.bases;
      return size.rest + size.layers * cost.layer_parameters(replaced);
    }
  }
  return 0;
}

int64_t target_parameters(const Budget& budget, const ReplacementCost& cost, double bytes_per_parameter) {
  const ModelSize& size = cost.size;
  const int64_t target = allowed_parameters(budget, cost, bytes_per_parameter);
  const int64_t least = size.rest + size.layers * cost.layer_parameters(size.slots);
  const auto share = [&](int64_t kept) {
    return 100.0 * (1 - static_cast<double>(kept) / static_cast<double>(size.total()));
  };
  check(target >= least, ErrorKind::kUsage,
        "{} is impossible: with every expert replaced, {} bases per layer and rank {} adapters, {:.1f} M parameters "
        "remain "
        "({:.1f} % removed, {:.3f} GiB), but at most {:.1f} M are allowed; ask for less, or for fewer bases or a lower "
        "rank",
        describe(budget), cost.bases, cost.rank, static_cast<double>(least) * 1e-6, share(least),
        static_cast<double>(least) * bytes_per_parameter * 0x1p-30, static_cast<double>(target) * 1e-6);
  return std::min(target, size.total());
}

}  // namespace lightmoe
