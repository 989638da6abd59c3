// LorExperts (arXiv 2608.07814): whole representatives, and a low-rank term for everybody else; the nearest train-free relative of LightMoE.
//   k-medoids over how often experts are chosen together;  the medoid stays whole;  a member becomes medoid + best rank-R approximation of
//   (member with its hidden units permuted to the medoid's) - medoid;  the router stays.
// Published (a note): the above with R = 64 at F of OLMoE's size, then a local reconstruction. Our reading: distance of i and j =
// 1 - n_ij / sqrt(n_i n_j) over the sampled tokens; R = F / 16; as many medoids as the budget allows, the same in every layer; plain SVD.
// Changed: no local reconstruction. Recovery trains the members' terms and new ones on the medoids' own slots, which stay.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>

#include "compress/budget.h"
#include "compress/merging.h"
#include "compress/svd.h"

namespace lightmoe {
namespace {

constexpr int kMaxRounds = 100;

std::vector<double> coactivation_distances(const MethodInput& input, int64_t layer) {
  const auto n = static_cast<size_t>(input.config.num_experts);
  const auto top_k = static_cast<size_t>(input.config.num_experts_per_token);
  const LayerSample sample = layer_sample(input, layer);
  std::vector<double> together(n * n, 0.0), d(n * n, 1.0);
  for (size_t t = 0; t < static_cast<size_t>(sample.tokens()); ++t) {
    for (size_t a = 0; a < top_k; ++a) {
      for (size_t b = 0; b < top_k; ++b) {
        together[static_cast<size_t>(sample.slots[t * top_k + a]) * n +
                 static_cast<size_t>(sample.slots[t * top_k + b])] += 1;
      }
    }
  }
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < n; ++j) {
      const double norm = std::sqrt(together[i * n + i] * together[j * n + j]);
      d[i * n + j] = i == j ? 0 : norm > 0 ? 1 - together[i * n + j] / norm : 1;
    }
  }
  return d;
}

// Medoid of each expert: starts from the `count` most used, then alternates assignment and the best medoid of each cluster.
std::vector<int32_t> medoids(const std::vector<double>& d, const std::vector<double>& use, size_t count) {
  const size_t n = use.size();
  std::vector<int32_t> centres(n), owner(n);
  std::iota(centres.begin(), centres.end(), 0);
  std::stable_sort(centres.begin(), centres.end(),
                   [&](int32_t a, int32_t b) { return use[static_cast<size_t>(a)] > use[static_cast<size_t>(b)]; });
  centres.resize(count);
  for (int round = 0; round < kMaxRounds; ++round) {
    std::sort(centres.begin(), centres.end());
    for (size_t i = 0; i < n; ++i) {
      owner[i] = *std::min_element(centres.begin(), centres.end(), [&](int32_t a, int32_t b) {
        return d[i * n + static_cast<size_t>(a)] < d[i * n + static_cast<size_t>(b)];
      });
    }
    for (const int32_t c : centres) owner[static_cast<size_t>(c)] = c;
    std::vector<int32_t> next;
    for (const int32_t c : centres) {
      double best = std::numeric_limits<double>::infinity();
      int32_t medoid = c;
      for (size_t i = 0; i < n; ++i) {
        if (owner[i] != c) continue;
        double sum = 0;
        for (size_t j = 0; j < n; ++j) sum += owner[j] == c ? d[i * n + j] : 0;
        if (sum < best) best = sum, medoid = static_cast<int32_t>(i);
      }
      next.push_back(medoid);
    }
    std::sort(next.begin(), next.end());
    if (next == centres) break;
    centres = next;
  }
  return owner;
}

// The factors of one member, matrix by matrix, kept until the next member is asked for.
class AlignedResiduals {
 public:
  AlignedResiduals(const MethodInput& input, int64_t layer, int64_t rank) : input_(input), layer_(layer), rank_(rank) {}
  Tensor factor(int32_t member, int32_t medoid, ExpertMatrix matrix, bool b) {
    if (last_ != member) {
      const ExpertMatrices base = read_expert(*input_.experts, layer_, medoid, DType::kF64);
      ExpertMatrices own = read_expert(*input_.experts, layer_, member, DType::kF64);
      own = with_units(own, aligned_units(base, own));
      factors_ = {factorise(own.gate, base.gate), factorise(own.up, base.up), factorise(own.down, base.down)};
      last_ = member;
    }
    const LowRank& made = factors_[static_cast<size_t>(matrix)];
    return b ? made.b : made.a;
  }

 private:
  LowRank factorise(const Tensor& own, const Tensor& base) const {
    for (int64_t i = 0; i < own.numel(); ++i) own.data<double>()[i] -= base.data<double>()[i];
    return best_low_rank(own, rank_, input_.options.seed);
  }

  MethodInput input_;
  int64_t layer_, rank_;
  int32_t last_ = -1;
  std::vector<LowRank> factors_;  // gate, up, down
};

int64_t representatives(const MethodInput& input, int64_t rank) {
  const ModelSize size = model_size(input.config);
  const ReplacementCost cost{.size = size, .bases = 1, .rank = 0};
  const int64_t allowed = allowed_parameters(input.options.budget, cost, input.bytes_per_parameter);
  const int64_t member = rank * size.adapter_unit,
                least = size.rest + size.layers * (size.expert + (size.slots - 1) * member);
  check(
      allowed >= least, ErrorKind::kUsage,
      "{} is impossible for lor-experts: one whole expert per layer and rank {} for the others are {:.1f} M parameters "
      "({:.1f} % removed), but at most {:.1f} M are allowed; ask for less",
      describe(input.options.budget), rank, static_cast<double>(least) * 1e-6,
      100 * (1 - static_cast<double>(least) / static_cast<double>(size.total())), static_cast<double>(allowed) * 1e-6);
  const int64_t in_layer = (allowed - size.rest) / size.layers;
  return std::clamp((in_layer - size.slots * member) / (size.expert - member), int64_t{1}, size.slots);
}

Plan plan(const MethodInput& input) {
  const auto slots = static_cast<int32_t>(input.config.num_experts);
  const int64_t rank = std::max<int64_t>(1, input.config.intermediate_size / 16), kept = representatives(input, rank);
  if (kept == slots) return plain_plan(model_size(input.config));
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    const std::vector<int32_t> owner =
        medoids(coactivation_distances(input, l), input.statistics.layers[static_cast<size_t>(l)].count,
                static_cast<size_t>(kept));
    std::vector<PlannedExpert> experts;
    for (int32_t c = 0; c < slots; ++c) {
      std::vector<int32_t> members;
      for (int32_t s = 0; s < slots; ++s) {
        if (owner[static_cast<size_t>(s)] == c) members.push_back(s);
      }
      if (!members.empty()) experts.push_back({members, {{c}, {1.0}}});
    }
    LayerPlan layer = table_plan(slots, std::move(experts));
    const auto residuals = std::make_shared<AlignedResiduals>(input, l, rank);
    for (int32_t s = 0; s < slots; ++s) {
      const int32_t medoid = owner[static_cast<size_t>(s)];
      if (medoid == s) continue;
      const auto adapter = static_cast<int32_t>(layer.adapter_slot.size());
      layer.shape.slots[static_cast<size_t>(s)].adapter = adapter;
      layer.shape.adapter_rank.push_back(rank);
      layer.adapter_slot.push_back(s);
      for (const ExpertMatrix matrix : kExpertMatrices) {
        for (const bool b : {false, true}) {
          plan.computed[adapter_tensor_name(l, adapter, matrix, b)] = [=] {
            return residuals->factor(s, medoid, matrix, b);
          };
        }
      }
    }
    plan.layers.push_back(std::move(layer));
  }
  return plan;
}

const RegisterMethod method{
    {.name = "lor-experts",
     .summary = "medoids stay whole, their members become them plus an aligned low-rank residual",
     .paper = "2608.07814",
     .slots = "shared, adapter",
     .plan = &plan,
     .trainable = Trainable::kAdapters,
     .needs = Needs::kInputs,
     .train_free = true,
     .compresses = true}};

}  // namespace
}  // namespace lightmoe
