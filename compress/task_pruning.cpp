#include "compress/task_pruning.h"

#include <algorithm>

#include "compress/pruning.h"
#include "loaders/json.h"
#include "model/weights.h"

namespace lightmoe {

TaskPruner::TaskPruner(Olmoe& model, int64_t keep, int64_t steps)
    : model_(model),
      keep_(keep),
      half_(steps / 2),
      window_(std::max<int64_t>(1, half_ / kWindows)),
      mass_(model.blocks.size(), std::vector<double>(static_cast<size_t>(model.config.num_experts), 0.0)) {
  observer_.on_router = [this](const RouterView& view) {
    const Tensor slots = view.slots.on(DeviceKind::kCpu), gates = view.gates.on(DeviceKind::kCpu);
    std::vector<double>& mass = mass_[static_cast<size_t>(view.layer)];
    for (int64_t i = 0; i < slots.numel(); ++i) {
      mass[static_cast<size_t>(slots.data<int32_t>()[i])] += static_cast<double>(gates.data<float>()[i]);
    }
  };
}

std::vector<int32_t> TaskPruner::survivors(size_t layer) const {
  std::vector<int32_t> left;
  const std::vector<Slot>& slots = model_.blocks[layer].moe.slots;
  for (size_t s = 0; s < slots.size(); ++s) {
    if (slots[s].kind != SlotKind::kRemoved) left.push_back(static_cast<int32_t>(s));
  }
  return left;
}

void TaskPruner::drop(size_t layer, int32_t slot) {
  model_.blocks[layer].moe.slots[static_cast<size_t>(slot)].kind = SlotKind::kRemoved;
}

void TaskPruner::prune_layer(size_t layer, bool all) {
  std::vector<int32_t> left = survivors(layer);
  const std::vector<double>& mass = mass_[layer];
  const auto mass_of = [&mass](int32_t slot) { return mass[static_cast<size_t>(slot)]; };
  double sum = 0;
  for (const int32_t slot : left) sum += mass_of(slot);
  std::stable_sort(left.begin(), left.end(), [&](int32_t a, int32_t b) { return mass_of(a) < mass_of(b); });
  const double threshold = kBeta * sum / static_cast<double>(left.size());
  for (size_t i = 0; i + static_cast<size_t>(keep_) < left.size(); ++i) {
    if (all || mass_of(left[i]) < threshold) drop(layer, left[i]);
  }
}

void TaskPruner::before_step(int64_t step) {
  const int64_t done = step - 1;
  const bool now_final = done == half_;
  if (done == 0 || done > half_ || (done % window_ != 0 && !now_final)) return;
  for (size_t l = 0; l < mass_.size(); ++l) {
    prune_layer(l, now_final);
    std::fill(mass_[l].begin(), mass_[l].end(), 0.0);
  }
}

Plan TaskPruner::finish() {
  Plan plan;
  for (size_t l = 0; l < mass_.size(); ++l) {
    prune_layer(l, true);  // a run too short for a half
    MoeLayer& moe = model_.blocks[l].moe;
    const std::vector<int32_t> kept = survivors(l);
    std::vector<Slot> slots(moe.slots.size(), Slot{.kind = SlotKind::kRemoved});
    std::vector<Expert> experts;
    std::vector<Adapter> adapters;
    for (const int32_t s : kept) {
      const Slot& old = moe.slots[static_cast<size_t>(s)];
      Slot& slot = slots[static_cast<size_t>(s)];
      slot = {.expert = static_cast<int32_t>(experts.size())};
      experts.push_back(moe.experts[static_cast<size_t>(old.expert)]);
      if (old.adapter < 0) continue;
      slot.adapter = static_cast<int32_t>(adapters.size());
      adapters.push_back(moe.adapters[static_cast<size_t>(old.adapter)]);
    }
    moe.slots = std::move(slots), moe.experts = std::move(experts), moe.adapters = std::move(adapters);
    plan.layers.push_back(pruned_layer(model_.config.num_experts, kept));
  }
  name_parameters(model_);
  return plan;
}

Json TaskPruner::state() const {
  Json left = Json::array();
  for (size_t l = 0; l < mass_.size(); ++l) left.push_back(survivors(l));
  return Json{{"pruner", {{"mass", mass_}, {"survivors", left}}}};
}

void TaskPruner::restore(const Json& state) {
  check(state.is_object() && state.contains("pruner"), ErrorKind::kResume,
        "the checkpoint has no state of the pruning; it is of another method");
  const Json& mine = state["pruner"];
  mass_ = mine.at("mass").get<std::vector<std::vector<double>>>();
  const auto left = mine.at("survivors").get<std::vector<std::vector<int32_t>>>();
  for (size_t l = 0; l < mass_.size(); ++l) {
    for (const int32_t slot : survivors(l)) {
      if (!std::binary_search(left.at(l).begin(), left.at(l).end(), slot)) drop(l, slot);
    }
  }
}

}  // namespace lightmoe
