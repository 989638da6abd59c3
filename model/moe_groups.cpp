#include "model/moe_groups.h"

#include <algorithm>
#include <map>

#include "kernels/elementwise.h"

namespace lightmoe {
namespace {

constexpr int64_t kBlendBytes = 64 << 20;  // of the blends in memory at once, one matrix more at most

// beta original + (1-beta) bank, in scratch; the original itself at beta 1.
Tensor blended(const MoeGroup& group, ExpertHalf half, double beta, DType activation) {
  const Tensor& original = half_of(group.original, half)->value;
  if (beta == 1) return original;
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor y = Tensor::empty(original.shape(), activation);
  if (group.bank.gate_up != nullptr) {
    run(Blend{.beta = beta, .a = original, .b = half_of(group.bank, half)->value, .y = y});
  } else {
    y.fill_zero();
    run(Axpy{.alpha = beta, .x = original, .y = y});
  }
  return y;
}

}  // namespace

MoeGroups::MoeGroups(const MoeLayer& layer, bool base_once) {
  const size_t num_slots = layer.slots.size();
  for (const Expert& expert : layer.experts) groups.push_back({.bank = expert, .original = {}});
  for (const Latent& latent : layer.latents) {
    groups.push_back({.bank = {.gate_up = nullptr, .down = latent.down}, .original = {}});
  }
  group_of_slot.assign(num_slots + 1, -1);
  adapter_of_slot.assign(num_slots, -1);
  for (size_t s = 0; s < num_slots; ++s) {
    const Slot& slot = layer.slots[s];
    if (slot.kind != SlotKind::kExpert && slot.kind != SlotKind::kLatent) continue;
    const bool latent = slot.kind == SlotKind::kLatent;
    group_of_slot[s] = latent ? static_cast<int32_t>(layer.experts.size()) + slot.latent : slot.expert;
    adapter_of_slot[s] = slot.adapter;
  }
  if (layer.beta > 0) {
    beta = layer.beta;
    for (const AnnealedSlot& annealed : layer.annealed) {
      auto& group = group_of_slot[static_cast<size_t>(annealed.slot)];
      const MoeGroup own{.bank = layer.experts[static_cast<size_t>(group)], .original = annealed.original};
      group = static_cast<int32_t>(groups.size());
      groups.push_back(own);
    }
  }
  std::map<std::pair<int32_t, int32_t>, int32_t> lanes;  // (group, adapter) -> lowest slot
  std::vector<int> lanes_of_group(groups.size(), 0);
  std::vector<int32_t> lane(num_slots);
  bool merge = false;
  for (size_t s = 0; s < num_slots; ++s) {
    const auto [it, is_new] = lanes.try_emplace({group_of_slot[s], adapter_of_slot[s]}, static_cast<int32_t>(s));
    lane[s] = group_of_slot[s] < 0 ? static_cast<int32_t>(s) : it->second;
    merge = merge || lane[s] != static_cast<int32_t>(s);
    if (is_new && group_of_slot[s] >= 0) shared = ++lanes_of_group[static_cast<size_t>(group_of_slot[s])] > 1 || shared;
  }
  if (shared && !base_once) {
    std::vector<bool> taken(groups.size(), false);
    for (size_t s = 0; s < num_slots; ++s) {
      if (group_of_slot[s] < 0) continue;
      if (lane[s] != static_cast<int32_t>(s)) {
        group_of_slot[s] = group_of_slot[static_cast<size_t>(lane[s])];
        continue;
      }
      const auto own = static_cast<size_t>(group_of_slot[s]);
      if (taken[own]) {
        group_of_slot[s] = static_cast<int32_t>(groups.size());
        groups.push_back(MoeGroup(groups[own]));
      }
      taken[own] = true;
    }
    shared = false;
  }
  if (merge) lane_of_slot = std::move(lane);
}

bool has_rows(const DispatchPlan& plan, size_t group) {
  if (plan.group_offsets.device() != DeviceKind::kCpu) return true;  // not known yet: the work is queued, or recorded
  const int32_t* offsets = plan.group_offsets.data<int32_t>();
  return offsets[group + 1] > offsets[group];
}

const ParameterPtr& half_of(const Expert& expert, ExpertHalf half) {
  return half == ExpertHalf::kGateUp ? expert.gate_up : expert.down;
}

void use_group_weights(const MoeGroups& groups, const DispatchPlan& plan, ExpertHalf half, DType activation,
                       const std::function<void(const std::vector<Tensor>&)>& use) {
  const size_t count = groups.groups.size();
  std::vector<Tensor> weights(count);
  std::vector<size_t> annealed;
  for (size_t g = 0; g < count; ++g) {
    const MoeGroup& group = groups.groups[g];
    if (!has_rows(plan, g)) continue;
    if (group.annealed())
      annealed.push_back(g);
    else if (half_of(group.bank, half) != nullptr)
      weights[g] = half_of(group.bank, half)->value;
  }
  use(weights);
  for (size_t i = 0; i < annealed.size();) {
    weights.assign(count, Tensor());
    for (int64_t bytes = 0; i < annealed.size() && bytes < kBlendBytes; ++i) {
      Tensor& blend = weights[annealed[i]];
      blend = blended(groups.groups[annealed[i]], half, groups.beta, activation);
      bytes += blend.bytes();
    }
    use(weights);
  }
}

bool has_zero_rows(const MoeGroups& groups, const DispatchPlan& plan) {
  for (size_t g = 0; g < groups.groups.size(); ++g) {
    const MoeGroup& group = groups.groups[g];
    if (!group.annealed() && group.bank.gate_up == nullptr && has_rows(plan, g)) return true;
  }
  return false;
}

bool any_trainable(const MoeGroups& groups, ExpertHalf half) {
  return std::any_of(groups.groups.begin(), groups.groups.end(), [half](const MoeGroup& group) {
    return half_of(group.bank, half) != nullptr && half_of(group.bank, half)->trainable;
  });
}

bool any_trainable(const MoeLayer& layer) {
  const std::vector<ParameterPtr> all = layer.parameters();
  return std::any_of(all.begin() + 1, all.end(), [](const ParameterPtr& p) { return p->trainable; });
}

}  // namespace lightmoe
