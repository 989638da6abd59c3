#include "tests/support/moe_layers.h"

#include <algorithm>

namespace lightmoe::testing {
namespace {

ParameterPtr random_parameter(const std::string& name, const Shape& shape, DType dtype, uint64_t seed) {
  auto p = std::make_shared<Parameter>();
  p->name = name;
  p->value = random_tensor(shape, dtype, seed, 0.4);
  return p;
}

}  // namespace

MoeLayer make_layer(const LayerSpec& spec, DType dtype, DType trained_dtype, uint64_t seed) {
  const int64_t d = spec.hidden, f = spec.width, slots = static_cast<int64_t>(spec.expert_of_slot.size());
  const auto contains = [](const std::vector<int32_t>& list, int32_t v) {
    return std::find(list.begin(), list.end(), v) != list.end();
  };
  MoeLayer layer;
  layer.router = random_parameter("router", {slots, d}, dtype, seed++);
  const auto width_of = [&spec](int32_t e) {
    return spec.width_of_expert.empty() ? spec.width : spec.width_of_expert[static_cast<size_t>(e)];
  };
  const auto named = [](const std::vector<int32_t>& list, size_t s) { return list.empty() ? -1 : list[s]; };
  const int32_t bank = *std::max_element(spec.expert_of_slot.begin(), spec.expert_of_slot.end()) + 1;
  for (int32_t e = 0; e < bank; ++e) {
    if (contains(spec.zero_experts, e)) {
      layer.experts.push_back({});
      continue;
    }
    const bool frozen = contains(spec.frozen_experts, e);
    const DType own = frozen ? dtype : trained_dtype;
    layer.experts.push_back({random_parameter(fmt::format("expert {} gate_up", e), {2 * width_of(e), d}, own, seed),
                             random_parameter(fmt::format("expert {} down", e), {d, width_of(e)}, own, seed + 1)});
    seed += 2;
    layer.experts.back().gate_up->trainable = layer.experts.back().down->trainable = !frozen;
  }
  for (size_t s = 0; s < spec.expert_of_slot.size(); ++s) {
    Slot slot{.kind = spec.expert_of_slot[s] < 0 ? SlotKind::kRemoved : SlotKind::kExpert,
              .expert = spec.expert_of_slot[s]};
    if (const int32_t c = named(spec.constant_of_slot, s); c >= 0) {
      slot = {.kind = SlotKind::kConstant, .constant = c};
    }
    if (const int32_t p = named(spec.projection_of_slot, s); p >= 0) {
      slot = {.kind = SlotKind::kLatent, .latent = static_cast<int32_t>(layer.latents.size())};
      const auto part = [&](const char* name, const Shape& shape) {
        return random_parameter(fmt::format("latent {} {}", slot.latent, name), shape, trained_dtype, seed++);
      };
      const Shape factor{f, spec.latent_size};
      Latent latent{.a_gate = part("a_gate", factor), .a_up = part("a_up", factor), .projection = p};
      (spec.latent_down ? latent.a_down : latent.down) = part("down", spec.latent_down ? factor : Shape{d, f});
      if (spec.mix_of > 0) {
        latent.mix = part("mix", {spec.latent_down ? 3 : 2, spec.mix_of});
        latent.projection = -1;
      }
      layer.latents.push_back(latent);
    }
    const int64_t r = spec.rank_of_slot.empty() ? 0 : spec.rank_of_slot[s];
    if (r > 0) {
      slot.adapter = static_cast<int32_t>(layer.adapters.size());
      const auto part = [&](const char* name, const Shape& shape) {
        return random_parameter(fmt::format("adapter {} {}", slot.adapter, name), shape, trained_dtype, seed++);
      };
      const int64_t w = slot.kind == SlotKind::kExpert && !spec.wide_adapters ? width_of(slot.expert) : f;
      layer.adapters.push_back({part("a_gate_up", {2 * r, d}), part("b_gate", {w, r}), part("b_up", {w, r}),
                                part("a_down", {r, w}), part("b_down", {d, r})});
    }
    layer.slots.push_back(slot);
  }
  if (!spec.constant_of_slot.empty()) {
    const int32_t rows = *std::max_element(spec.constant_of_slot.begin(), spec.constant_of_slot.end()) + 1;
    layer.constants = random_parameter("constants", {rows, d}, trained_dtype, seed++);
  }
  if (!spec.projection_of_slot.empty()) {
    const int64_t last = *std::max_element(spec.projection_of_slot.begin(), spec.projection_of_slot.end());
    const int64_t k = spec.projection_rank, rows = k > 0 ? k : spec.latent_size, below = spec.latent_size - rows;
    for (int64_t p = 0; p < (spec.mix_of > 0 ? spec.mix_of : last + 1); ++p) {
      const auto part = [&](const char* name, bool wanted, const Shape& shape) {
        return wanted ? random_parameter(fmt::format("projection {} {}", p, name), shape, trained_dtype, seed++)
                      : nullptr;
      };
      layer.projections.push_back({.gate_up = part("gate_up", true, {2 * rows, d}),
                                   .down = part("down", spec.latent_down, {rows, d}),
                                   .left_gate_up = part("left_gate_up", k > 0, {2 * below, k}),
                                   .left_down = part("left_down", k > 0 && spec.latent_down, {below, k})});
    }
  }
  for (const int32_t s : spec.annealed_slots) {
    layer.annealed.push_back({s,
                              {random_parameter("original", {2 * f, d}, dtype, seed),
                               random_parameter("original", {d, f}, dtype, seed + 1)}});
    seed += 2;
  }
  layer.beta = spec.beta;
  return layer;
}

Tensor random_slots(int64_t tokens, int64_t top_k, const std::vector<int32_t>& allowed, uint64_t seed) {
  Philox random(seed);
  std::vector<int32_t> slots;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<int32_t> left = allowed;
    for (int64_t k = 0; k < top_k; ++k) {
      const auto pick = static_cast<int64_t>(random.below(left.size()));
      slots.push_back(left[static_cast<size_t>(pick)]);
      left.erase(left.begin() + pick);
    }
  }
  return Tensor::from(slots, {tokens, top_k});
}

}  // namespace lightmoe::testing
