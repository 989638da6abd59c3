#include "model/moe.h"

#include <set>

#include "model/moe_extension.h"

namespace lightmoe {

bool MoeLayer::is_plain() const {
  if (!adapters.empty() || !annealed.empty() || !latents.empty() || experts.size() != slots.size()) return false;
  if (extension != nullptr) return false;
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
  const auto add = [&all](const ParameterPtr& p) {
    if (p != nullptr) all.push_back(p);
  };
  for (const Projection& p : projections) {
    for (const ParameterPtr& part : {p.gate_up, p.down, p.left_gate_up, p.left_down}) add(part);
  }
  for (const Latent& latent : latents) {
    for (const ParameterPtr& part : {latent.a_gate, latent.a_up, latent.down, latent.a_down, latent.mix}) add(part);
  }
  for (const Adapter& a : adapters) all.insert(all.end(), {a.a_gate_up, a.b_gate, a.b_up, a.a_down, a.b_down});
  if (extension == nullptr) return all;
  for (const ExtensionTensor& tensor : extension->tensors()) all.push_back(tensor.parameter);
  return all;
}

bool owns_its_experts(const MoeLayer& layer) {
  std::set<int32_t> seen;
  for (const Slot& slot : layer.slots) {
    if (slot.kind == SlotKind::kRemoved) continue;
    if (slot.kind != SlotKind::kExpert || slot.adapter >= 0 || !seen.insert(slot.expert).second) return false;
    if (layer.experts[static_cast<size_t>(slot.expert)].gate_up == nullptr) return false;
  }
  return layer.annealed.empty();
}

int64_t MoeLayer::stored_bytes() const {
  int64_t bytes = 0;
  for (const ParameterPtr& p : parameters()) bytes += p->value.bytes();
  return bytes;
}

}  // namespace lightmoe
