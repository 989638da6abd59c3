#pragma once
// What a method decides, before any weight is touched: per layer a slot table, how each bank entry is made from the layer's
// original experts, and which slots carry an adapter. Small, pure data: the streaming writer, the dry run, the recovery and the
// report all read the same plan, and it is what compression.json records.

#include <cstdint>
#include <vector>

#include "compress/budget.h"
#include "loaders/json.h"
#include "model/slot_table.h"

namespace lightmoe {

// W = sum_i weights_i W_experts_i, matrix by matrix; nothing listed means W = 0.
struct BankEntry {
  std::vector<int32_t> experts;
  std::vector<double> weights;
  bool is_copy() const { return experts.size() == 1 && weights[0] == 1; }
  bool is_zero() const { return experts.empty(); }
};

struct LayerPlan {
  LayerShape shape;
  std::vector<BankEntry> bank;        // one per entry of the shape
  std::vector<int32_t> adapter_slot;  // slot of each adapter
  std::vector<int32_t> replaced;      // slots that lost their own expert, the least important first
  std::vector<int32_t> bases;         // bank entries that replace them, zero entries left out
  double threshold = 0;               // p_j, where the method has one
};

struct Plan {
  std::vector<LayerPlan> layers;
  double base_threshold = 0;
  bool is_plain() const;  // nothing changed: a stock model
  std::vector<LayerShape> shapes() const;
  int64_t replaced() const;  // slots in all layers
  int64_t fading() const;    // of those, the ones that have an expert to fade into
};

LayerPlan plain_layer_plan(int64_t num_slots);
Plan plain_plan(const ModelSize& size);
// Slots of `replaced` point to the base of their group (bases follow the kept experts in the bank) and get an adapter each, in the
// order of the slots. groups empty: they share one entry W = 0.
struct SlotGroup;
LayerPlan replacement_plan(int64_t num_slots, const std::vector<int32_t>& replaced,
                           const std::vector<SlotGroup>& groups, int64_t rank);

// One stored expert and the slots that point to it.
struct PlannedExpert {
  std::vector<int32_t> slots;
  BankEntry made_of;
};
// Slots of no expert are removed. Bank entries stand in the order of their lowest slot, so that nothing changed is the plain plan.
LayerPlan table_plan(int64_t num_slots, std::vector<PlannedExpert> experts);

// The shapes in training: an adapter of `rank` for every stored expert on its slots that have none (they share it, so that it can
// be merged into the expert afterwards); rank 0 changes nothing.
std::vector<LayerShape> with_adapters(std::vector<LayerShape> shapes, int64_t rank);

Json to_json(const Plan& plan);
// Error(kInput) starting with `name`. Shapes are not part of the text: they stand in config.json.
Plan plan_from_json(const Json& object, const std::vector<LayerShape>& shapes, const std::string& name);

}  // namespace lightmoe
