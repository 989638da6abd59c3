#include "model/moe_widths.h"

#include <algorithm>
#include <map>

#include "runtime/dispatch.h"

namespace lightmoe {
namespace {

constexpr int64_t kNone = 0;  // goes with the first part

int64_t width_of_slot(const MoeLayer& layer, const Slot& slot) {
  if (slot.kind == SlotKind::kLatent) return layer.latents[static_cast<size_t>(slot.latent)].a_gate->value.dim(0);
  if (slot.kind != SlotKind::kExpert) return kNone;
  const Expert& expert = layer.experts[static_cast<size_t>(slot.expert)];
  if (expert.down != nullptr) return expert.down->value.dim(1);
  return slot.adapter < 0 ? kNone : layer.adapters[static_cast<size_t>(slot.adapter)].b_gate->value.dim(0);
}

// The slots of one width; the others count as removed.
MoeLayer part_of(const MoeLayer& layer, const std::vector<int64_t>& widths, int64_t width, bool first) {
  const auto belongs = [&](size_t s) { return widths[s] == width || (first && widths[s] == kNone); };
  MoeLayer part{.router = layer.router,
                .slots = layer.slots,
                .experts = {},
                .adapters = layer.adapters,
                .constants = first ? layer.constants : nullptr,
                .projections = layer.projections,
                .latents = {},
                .annealed = {},
                .beta = layer.beta};
  std::vector<int32_t> new_expert(layer.experts.size(), -1), new_latent(layer.latents.size(), -1);
  for (size_t s = 0; s < layer.slots.size(); ++s) {
    Slot& slot = part.slots[s];
    if (!belongs(s)) {
      slot = {.kind = SlotKind::kRemoved};
    } else if (slot.kind == SlotKind::kExpert) {
      int32_t& index = new_expert[static_cast<size_t>(slot.expert)];
      if (index < 0) {
        index = static_cast<int32_t>(part.experts.size());
        part.experts.push_back(layer.experts[static_cast<size_t>(slot.expert)]);
      }
      slot.expert = index;
    } else if (slot.kind == SlotKind::kLatent) {
      int32_t& index = new_latent[static_cast<size_t>(slot.latent)];
      if (index < 0) {
        index = static_cast<int32_t>(part.latents.size());
        part.latents.push_back(layer.latents[static_cast<size_t>(slot.latent)]);
      }
      slot.latent = index;
    }
  }
  for (const AnnealedSlot& annealed : layer.annealed) {
    if (belongs(static_cast<size_t>(annealed.slot))) part.annealed.push_back(annealed);
  }
  return part;
}

}  // namespace

bool has_one_width(const MoeLayer& layer) {
  int64_t first = kNone;
  const auto same = [&first](int64_t width) {
    if (first == kNone) first = width;
    return width == first;
  };
  return std::all_of(layer.experts.begin(), layer.experts.end(),
                     [&](const Expert& e) { return e.down == nullptr || same(e.down->value.dim(1)); }) &&
         std::all_of(layer.latents.begin(), layer.latents.end(),
                     [&](const Latent& l) { return same(l.a_gate->value.dim(0)); });
}

std::vector<MoeLayer> split_by_width(const MoeLayer& layer, const Tensor& slots) {
  std::vector<int64_t> widths;
  for (const Slot& slot : layer.slots) widths.push_back(width_of_slot(layer, slot));
  std::map<int64_t, bool> chosen;                         // width -> some token asks for it
  const bool every = slots.device() != DeviceKind::kCpu;  // as the choices are not known yet
  for (const int64_t width : widths) {
    if (width != kNone) chosen[width] = every;
  }
  for (int64_t i = 0; !every && i < slots.numel(); ++i) {
    const auto slot = static_cast<size_t>(slots.data<int32_t>()[i]);
    if (slot < widths.size()) chosen[widths[slot] == kNone ? chosen.begin()->first : widths[slot]] = true;
  }
  std::vector<MoeLayer> parts;
  for (const auto& [width, is_chosen] : chosen) {
    if (is_chosen) parts.push_back(part_of(layer, widths, width, width == chosen.begin()->first));
  }
  if (parts.empty()) parts.push_back(part_of(layer, widths, chosen.begin()->first, true));
  return parts;
}

}  // namespace lightmoe
