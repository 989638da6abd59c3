// MC-SMoE (arXiv 2310.01334; code UNITES-Lab/MC-SMoE): M-SMoE, then its merged experts become low rank plus structured-sparse.
//   1. groups and merged experts as in compress/merge_m_smoe.cpp;  2. every matrix W = U V + S, U V its best rank-R approximation, and of S
//   a part is dropped progressively while the model trains, what has the least moving average of |w dL/dw| first (beta 0.85)
// Published: both steps (rank by a share of the parameters, 1/32 by default; 10 % of S stays at the end; columns of S; distillation with
// T = 2 and weight 0.2, AdamW; everything trains). Our reading: what goes of S are hidden units, rows of gate and up and columns of down
// together, so that the stored expert is narrower and every unit beyond it is U V alone (struct Expert in model/moe.h); all stored
// experts are decomposed, merged or not; half of what the budget removes goes by merging; R makes U V as many parameters as LightMoE
// trains, at most half of what is left for the experts, and S has what remains.
// As compressed, the units of S that stay are those with the largest squares; recovery starts from the whole merged experts and cuts them
// down along a cubic curve in its first half (compress/unit_pruning.h). All of S and U V train: more than LightMoE does, as the paper has
// it.
// Changed: no distillation (the merge has no full-size teacher in memory). No --refit: recovery makes the merged experts again, from the
// original's files alone.

#include <algorithm>
#include <cmath>
#include <memory>

#include "compress/decomposition.h"
#include "compress/expert_budget.h"
#include "compress/weights.h"

namespace lightmoe {
namespace {

struct Sizes {
  int64_t experts = 0;  // in all layers
  int64_t rank = 0, units = 0;
};

// The smallest model that the rule below makes, at rank 1 with one unit: experts(a) (unit + 3 D) = a - rest, experts(a) = ((total + a) / 2 -
// rest) / expert.
int64_t least_parameters(const ModelSize& size) {
  const double q = static_cast<double>(size.adapter_unit + 3 * size.hidden) / static_cast<double>(size.expert);
  const auto rest = static_cast<double>(size.rest), total = static_cast<double>(size.total());
  return static_cast<int64_t>((rest + (total / 2 - rest) * q) / (1 - q / 2)) + 1;
}

Sizes sizes_for(const MethodInput& input) {
  const ModelSize size = model_size(input.config);
  const MethodOptions& options = input.options;
  const ReplacementCost cost{.size = size, .bases = 1, .rank = 0};
  const int64_t allowed = std::min(size.total(), allowed_parameters(options.budget, cost, input.bytes_per_parameter));
  const int64_t merged = ((size.total() + allowed) / 2 - size.rest) / size.expert;
  Sizes sizes{.experts = std::clamp(merged, size.layers, size.layers * size.slots)};
  const int64_t left = allowed - size.rest, one_rank = sizes.experts * size.adapter_unit;
  const double trained = static_cast<double>(lightmoe_trainable(size, options.bases, options.rank));
  sizes.rank = options.method_rank > 0 ? options.method_rank : std::llround(trained / static_cast<double>(one_rank));
  if (options.method_rank == 0)
    sizes.rank = std::clamp(sizes.rank, int64_t{1}, std::max<int64_t>(1, left / 2 / one_rank));
  sizes.units = std::min(size.width, (left - sizes.rank * one_rank) / (sizes.experts * 3 * size.hidden));
  const int64_t least = least_parameters(size);
  check(sizes.units >= 1 && left > sizes.rank * one_rank, ErrorKind::kUsage,
        "{} is impossible for mc-smoe: {} merged experts of rank {} and one hidden unit are more than the {:.1f} M "
        "parameters allowed; the nearest possible at rank 1 are about {:.1f} M ({:.1f} % removed, {:.3f} GiB)",
        describe(options.budget), sizes.experts, sizes.rank, static_cast<double>(allowed) * 1e-6,
        static_cast<double>(least) * 1e-6, 100 * (1 - static_cast<double>(least) / static_cast<double>(size.total())),
        static_cast<double>(least) * input.bytes_per_parameter * 0x1p-30);
  return sizes;
}

// The last expert asked for: its tensors are written one after the other.
class Decompositions {
 public:
  Decompositions(const MethodInput& input, int64_t layer, int64_t rank) : input_(input), layer_(layer), rank_(rank) {}
  const Decomposition& of(size_t entry, const BankEntry& group) {
    if (entry != last_) made_ = decompose(input_, layer_, group, rank_), last_ = entry;
    return made_;
  }

 private:
  MethodInput input_;
  int64_t layer_, rank_;
  size_t last_ = static_cast<size_t>(-1);
  Decomposition made_;
};

const LowRank& part_of(const Decomposition& d, ExpertMatrix matrix) {
  return matrix == ExpertMatrix::kGate ? d.gate : matrix == ExpertMatrix::kUp ? d.up : d.down;
}
const Tensor& sparse_of(const Decomposition& d, ExpertMatrix matrix) {
  return matrix == ExpertMatrix::kGate ? d.sparse.gate : matrix == ExpertMatrix::kUp ? d.sparse.up : d.sparse.down;
}

// Every stored expert of a merged layer narrower, with an adapter for all its slots.
void decompose_layer(Plan& plan, const MethodInput& input, int64_t l, const Sizes& sizes) {
  LayerPlan& layer = plan.layers[static_cast<size_t>(l)];
  const size_t entries = layer.bank.size();
  layer.shape.widths.assign(entries, sizes.units);
  layer.shape.wide_adapters = sizes.units < input.config.intermediate_size;
  if (!layer.shape.wide_adapters) layer.shape.widths.clear();
  layer.shape.adapter_rank.assign(entries, sizes.rank);
  layer.adapter_slot.assign(entries, -1);
  layer.bases.clear(), layer.replaced.clear();
  for (size_t j = 0; j < entries; ++j) layer.bases.push_back(static_cast<int32_t>(j));
  for (size_t s = 0; s < layer.shape.slots.size(); ++s) {
    Slot& slot = layer.shape.slots[s];
    slot.adapter = slot.expert;
    int32_t& first = layer.adapter_slot[static_cast<size_t>(slot.adapter)];
    if (first < 0) first = static_cast<int32_t>(s);
    layer.replaced.push_back(static_cast<int32_t>(s));
  }
  const auto made = std::make_shared<Decompositions>(input, l, sizes.rank);
  for (size_t j = 0; j < entries; ++j) {
    const auto entry = static_cast<int64_t>(j);
    for (const ExpertMatrix matrix : kExpertMatrices) {
      const auto of = [made, j, group = layer.bank[j]] { return made->of(j, group); };
      plan.computed[bank_tensor_name(l, entry, matrix)] = [of, matrix, units = sizes.units] {
        return first_units(sparse_of(of(), matrix), matrix, units);
      };
      plan.computed[adapter_tensor_name(l, entry, matrix, false)] = [of, matrix] { return part_of(of(), matrix).a; };
      plan.computed[adapter_tensor_name(l, entry, matrix, true)] = [of, matrix] { return part_of(of(), matrix).b; };
    }
  }
}

Plan plan(const MethodInput& input) {
  const Sizes sizes = sizes_for(input);
  const ModelSize size = model_size(input.config);
  if (sizes.experts == size.layers * size.slots) return plain_plan(size);
  const MergeOptions mean{};
  Plan plan = plan_merging(input, m_smoe_groups(input, sizes.experts), mean);
  for (int64_t l = 0; l < input.config.num_layers; ++l) decompose_layer(plan, input, l, sizes);
  plan.units_go_in_recovery = sizes.units < size.width;
  return plan;
}

const RegisterMethod method{{.name = "mc-smoe",
                             .summary = "M-SMoE, then low rank plus sparse; units go while recovery trains",
                             .paper = "2310.01334",
                             .slots = "shared, adapter, narrow",
                             .plan = &plan,
                             .trainable = Trainable::kBasesAndAdapters,
                             .needs = Needs::kSums,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
