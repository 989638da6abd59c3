#include "model/moe.h"

namespace lightmoe {

bool MoeLayer::is_plain() const {
  if (!adapters.empty() || !annealed.empty() || !latents.empty() || experts.size() != slots.size()) return false;
  for (size_t i = 0; i < slots.size(); ++i) {
    const Slot& slot = slots[i];
    if (slot.kind != SlotKind::kExpert || slot.expert != static_cast<int32_t>(i) || slot.adapter >= 0) return false;
    if (experts[i].gate_up == nullptr) return false;
  }
  return true;
}

std::vector<ParameterPtr> MoeLayer::parameters() const {
  std::vector<ParameterPtr> all{router};
  for (const Expert& expert : experts) {
    if (expert.gate_up != nullptr) all.insert(all.end(), {expert.gate_up, expert.down});
  }
  if (constants != nullptr) all.push_back(constants);
  all.insert(all.end(), projections.begin(), projections.end());
  for (const Latent& latent : latents) all.insert(all.end(), {latent.a_gate, latent.a_up, latent.down});
  for (const Adapter& a : adapters) all.insert(all.end(), {a.a_gate_up, a.b_gate, a.b_up, a.a_down, a.b_down});
  return all;
}

int64_t MoeLayer::stored_bytes() const {
  int64_t bytes = 0;
  for (const ParameterPtr& p : parameters()) bytes += p->value.bytes();
  return bytes;
}

}  // namespace lightmoe
