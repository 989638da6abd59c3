#include "compress/rank_allocation.h"

#include <algorithm>

#include "compress/residuals.h"

namespace lightmoe {
namespace {

constexpr int64_t kMostTimes = 4;  // R

struct Gain {
  double energy;
  size_t layer, adapter;
};

}  // namespace

void allocate_ranks(Plan& plan, const MethodInput& input, int64_t rank) {
  Residuals residuals(input, input.options.adapter_init == AdapterInit::kWhitenedSvd);
  const int64_t most = std::min(kMostTimes * rank, std::min(input.config.hidden_size, input.config.intermediate_size));
  std::vector<Gain> gains;  // of the second rank of each slot on
  int64_t left = 0;
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    LayerPlan& layer = plan.layers[l];
    for (size_t a = 0; a < layer.adapter_slot.size(); ++a) {
      const int32_t slot = layer.adapter_slot[a];
      const BankEntry& base = layer.bank[static_cast<size_t>(layer.shape.slots[static_cast<size_t>(slot)].expert)];
      std::vector<double> energy(static_cast<size_t>(most), 0.0);
      for (const ExpertMatrix matrix : kExpertMatrices) {
        const std::vector<double> values =
            residuals.singular_values({static_cast<int64_t>(l), slot, matrix}, base, most);
        for (size_t k = 0; k < values.size(); ++k) energy[k] += values[k] * values[k];
      }
      for (size_t k = 1; k < energy.size(); ++k) gains.push_back({energy[k], l, a});
      left += layer.shape.adapter_rank[a] - 1;
      layer.shape.adapter_rank[a] = 1;
    }
  }
  std::stable_sort(gains.begin(), gains.end(), [](const Gain& a, const Gain& b) { return a.energy > b.energy; });
  gains.resize(std::min(gains.size(), static_cast<size_t>(left)));
  for (const Gain& gain : gains) ++plan.layers[gain.layer].shape.adapter_rank[gain.adapter];
}

}  // namespace lightmoe
