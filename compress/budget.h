#pragma once
// How many parameters a model has, and how many it may keep. Pure arithmetic on the shapes in config.json.
//   expert 3 D F;  adapter of rank R: 3 R (D + F)  (gate and up [R,D] [F,R], down [R,F] [D,R])
//   rho = 1 - kept / all: of the whole model by default (what the paper's 30/40/50 % mean), or of the expert weights alone.

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/slot_table.h"

namespace lightmoe {

struct ModelSize {
  int64_t layers = 0, slots = 0;  // L, E
  int64_t hidden = 0, width = 0;  // D, F
  int64_t expert = 0;             // parameters of one expert
  int64_t adapter_unit = 0;       // parameters of an adapter of rank 1
  int64_t rest = 0;               // embedding, attention, norms, routers, head
  int64_t all_experts() const { return layers * slots * expert; }
  int64_t total() const { return all_experts() + rest; }
};
ModelSize model_size(const OlmoeConfig& config);
// What a layer's bank and adapters hold, counted from what is stored.
int64_t stored_parameters(const LayerShape& layer, const ModelSize& size);
int64_t adapter_parameters(const LayerShape& layer, const ModelSize& size);
int64_t stored_parameters(const std::vector<LayerShape>& layers, const ModelSize& size);  // whole model

// What replacing costs: of a layer with n replaced slots, n experts go, min(n, bases) bases and n adapters come. While that
// saves nothing (n <= bases) the layer is left alone, so `parameters` never grows with n.
struct ReplacementCost {
  ModelSize size;
  int64_t bases = 3;  // M; 0 = no shared base
  int64_t rank = 16;  // R
  bool saves(int64_t replaced) const;
  int64_t layer_parameters(int64_t replaced) const;
};

enum class BudgetKind : uint8_t { kWholeModel, kExperts, kGib, kExpertsPerLayer };
struct Budget {
  BudgetKind kind = BudgetKind::kWholeModel;
  double value = 0.5;  // share removed; GiB kept; experts stored per layer, bases included
};
std::string describe(const Budget& budget);  // "50 % of the whole model"

// The most parameters (of the whole model) that the budget allows, whether reachable or not; bytes_per_parameter serves kGib.
// kExpertsPerLayer counts by `cost`. Error(kUsage): value out of range.
int64_t allowed_parameters(const Budget& budget, const ReplacementCost& cost, double bytes_per_parameter);
// The same, reachable with bases and adapters.
// Error(kUsage): value out of range, or less than everything replaced leaves (the message says the nearest possible).
int64_t target_parameters(const Budget& budget, const ReplacementCost& cost, double bytes_per_parameter);

}  // namespace lightmoe
