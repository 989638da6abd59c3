// Fisher pruning of units inside experts ("Less is MoE", arXiv 2606.05538): not experts go, but single intermediate units of them, those
// whose weights the loss feels least.
//   s_ej = (1/D) sum_k (dL/dW_g)_jk^2 + (dL/dW_u)_jk^2 + (dL/dW_d)_kj^2, averaged over the calibration's sequences
//   rows j of gate and up and column j of down are removed; the router stays as it is; experts become narrower, not fewer.
//   fisher-e: the same number in every expert, the lowest of each;  fisher-l: the lowest of a layer;  fisher-g: the lowest of the model.
// Published: the score, 128 samples, the three scopes (E, L, G), physical removal. Our reading: L is the mean cross-entropy of one
// sequence, squared sequence by sequence; ties go at the lower layer, expert and unit. Changed: every expert keeps its best unit, so
// that no slot is left without a function; the budget counts whole units of 3 D weights, as many as fit.

#include <algorithm>
#include <tuple>

#include "compress/expert_sample.h"
#include "compress/pruning.h"
#include "compress/text.h"
#include "compress/weights.h"

namespace lightmoe {
namespace {

enum class Scope : uint8_t { kExpert, kLayer, kModel };

// Units that all experts together may keep.
int64_t units_in_all(const MethodInput& input) {
  const ModelSize size = model_size(input.config);
  const int64_t allowed =
      allowed_parameters(input.options.budget, {.size = size, .bases = 1, .rank = 0}, input.bytes_per_parameter);
  const int64_t unit = 3 * size.hidden, experts = size.layers * size.slots, minimum = size.rest + experts * unit;
  check(allowed >= minimum, ErrorKind::kUsage,
        "{} is impossible: one unit of every expert must stay, so {:.1f} M parameters remain ({:.1f} % removed, {:.3f} "
        "GiB), but at most {:.1f} M are allowed; ask for less",
        describe(input.options.budget), static_cast<double>(minimum) * 1e-6,
        100 * (1 - static_cast<double>(minimum) / static_cast<double>(size.total())),
        static_cast<double>(minimum) * input.bytes_per_parameter * 0x1p-30, static_cast<double>(allowed) * 1e-6);
  return std::min((allowed - size.rest) / unit, experts * size.width);
}

struct Unit {
  double score;
  int32_t layer, expert, unit;
};

// Every unit of the model, layer by layer.
std::vector<Unit> scored_units(const MethodInput& input) {
  const OlmoeConfig& c = input.config;
  const auto count = static_cast<size_t>(c.num_experts * c.intermediate_size);
  std::vector<Unit> units;
  for (int64_t l = 0; l < c.num_layers; ++l) {
    std::vector<double> scores = input.statistics.layers[static_cast<size_t>(l)].unit_gradient2;
    if (input.statistics.uniform) scores.assign(count, 1.0);
    check(scores.size() == count, ErrorKind::kInput,
          "the statistics have gradients of {} units per expert, the model's experts have {}",
          static_cast<int64_t>(scores.size()) / c.num_experts, c.intermediate_size);
    apply_starved_policy(input, l, scores);
    for (size_t i = 0; i < count; ++i) {
      const auto index = static_cast<int64_t>(i);
      units.push_back({scores[i], static_cast<int32_t>(l), static_cast<int32_t>(index / c.intermediate_size),
                       static_cast<int32_t>(index % c.intermediate_size)});
    }
  }
  return units;
}

// kept[layer][expert]: units that stay, ascending.
using KeptUnits = std::vector<std::vector<std::vector<int32_t>>>;

// Of the units [begin, end), whole experts after each other: the best of every expert, then the best of all, `count` together.
void keep_best(std::vector<Unit>::iterator begin, std::vector<Unit>::iterator end, int64_t count, KeptUnits& kept) {
  const auto better = [](const Unit& a, const Unit& b) {
    if (a.score != b.score) return a.score > b.score;
    return std::tie(a.layer, a.expert, a.unit) > std::tie(b.layer, b.expert, b.unit);
  };
  std::sort(begin, end, better);
  const auto units_of = [&kept](const Unit& u) -> std::vector<int32_t>& {
    return kept[static_cast<size_t>(u.layer)][static_cast<size_t>(u.expert)];
  };
  std::vector<Unit> others;
  for (auto u = begin; u != end; ++u) {
    if (!units_of(*u).empty())
      others.push_back(*u);
    else
      units_of(*u).push_back(u->unit), --count;
  }
  for (size_t i = 0; static_cast<int64_t>(i) < count; ++i) units_of(others[i]).push_back(others[i].unit);
}

KeptUnits choose_units(const MethodInput& input, Scope scope) {
  const OlmoeConfig& c = input.config;
  const int64_t all = units_in_all(input), layers = c.num_layers, experts = c.num_experts;
  std::vector<Unit> units = scored_units(input);
  const int64_t pools = scope == Scope::kModel ? 1 : scope == Scope::kLayer ? layers : layers * experts;
  const auto size = std::ssize(units) / pools;
  KeptUnits kept(static_cast<size_t>(layers), std::vector<std::vector<int32_t>>(static_cast<size_t>(experts)));
  for (int64_t p = 0; p < pools; ++p) {
    keep_best(units.begin() + p * size, units.begin() + (p + 1) * size, all / pools, kept);
  }
  for (auto& layer : kept) {
    for (std::vector<int32_t>& list : layer) std::sort(list.begin(), list.end());
  }
  return kept;
}

// Rows of gate and up, columns of down.
ExpertMatrices with_units(const ExpertMatrices& whole, const std::vector<int32_t>& units) {
  const auto count = static_cast<int64_t>(units.size()), d = whole.gate.dim(1), f = whole.gate.dim(0);
  const ExpertMatrices part{.gate = Tensor::empty({count, d}, DType::kF32),
                            .up = Tensor::empty({count, d}, DType::kF32),
                            .down = Tensor::empty({d, count}, DType::kF32)};
  for (int64_t j = 0; j < count; ++j) {
    const int64_t from = units[static_cast<size_t>(j)];
    part.gate.slice(j, j + 1).copy_from(whole.gate.slice(from, from + 1));
    part.up.slice(j, j + 1).copy_from(whole.up.slice(from, from + 1));
    for (int64_t i = 0; i < d; ++i) part.down.data<float>()[i * count + j] = whole.down.data<float>()[i * f + from];
  }
  return part;
}

template <Scope kScope>
Plan plan(const MethodInput& input) {
  const KeptUnits kept = choose_units(input, kScope);
  Plan plan = plain_plan(model_size(input.config));
  for (size_t l = 0; l < kept.size(); ++l) {
    LayerPlan& layer = plan.layers[l];
    for (size_t e = 0; e < kept[l].size(); ++e) {
      const auto width = std::ssize(kept[l][e]);
      layer.shape.widths.push_back(width);
      if (width == input.config.intermediate_size) continue;
      layer.replaced.push_back(static_cast<int32_t>(e));
      if (input.experts == nullptr) continue;
      const auto at = static_cast<int64_t>(l), expert = static_cast<int64_t>(e);
      compute_expert(plan, at, expert, [&experts = *input.experts, at, expert, units = kept[l][e]] {
        return with_units(read_expert(experts, at, expert), units);
      });
    }
    if (layer.replaced.empty()) layer.shape.widths.clear();
  }
  return plan;
}

Method fisher(std::string name, std::string summary, Plan (*plan)(const MethodInput&)) {
  return {.name = std::move(name),
          .summary = std::move(summary),
          .paper = "2606.05538",
          .slots = "narrow",
          .plan = plan,
          .trainable = Trainable::kAdapters,
          .needs = Needs::kUnitGradients,
          .train_free = true,
          .compresses = true};
}

const RegisterMethod of_expert{
    fisher("fisher-e", "the units of least squared gradient go, as many of every expert", &plan<Scope::kExpert>)};
const RegisterMethod of_layer{
    fisher("fisher-l", "the units of least squared gradient go, ranked layer by layer", &plan<Scope::kLayer>)};
const RegisterMethod of_model{
    fisher("fisher-g", "the units of least squared gradient go, ranked over the model", &plan<Scope::kModel>)};

}  // namespace
}  // namespace lightmoe
