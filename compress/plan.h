#pragma once
// What a method decides, before any weight is touched: per layer a slot table, how each bank entry is made from the layer's
// original experts, and which slots carry an adapter. Small, pure data: the streaming writer, the dry run, the recovery and the
// report all read the same plan, and it is what compression.json records.

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "compress/budget.h"
#include "loaders/json_type.h"
#include "model/slot_table.h"

namespace lightmoe {

// W = sum_i weights_i W_experts_i, matrix by matrix; nothing listed means W = 0.
struct BankEntry {
  std::vector<int32_t> experts;
  std::vector<double> weights;
  int32_t layer = -1;  // whose experts; -1 = the layer's own
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
  // Whether a replaced slot has an expert of the original's shape to fade into; where experts lost units, none has.
  bool fades(int32_t slot) const;
};

// Makes one tensor, whole, when its turn comes.
using MakeTensor = std::function<Tensor()>;

struct Plan {
  std::vector<LayerPlan> layers;
  double base_threshold = 0;
  int64_t experts_to_keep = 0;  // per layer, of methods that choose them while recovery trains; 0: the plan says all
  // Recovery starts from the whole merged experts and cuts them down to the widths while it trains (compress/unit_pruning.h).
  bool units_go_in_recovery = false;
  // Tensors that are not what bank and adapter_slot say: constants, latents, refitted experts, given factors; by stored name.
  // Not part of the text; entries of the bank still name the experts they are made of.
  std::map<std::string, MakeTensor> computed;
  int64_t working_bytes = 0;  // the most memory that making them takes, where that is more than a few experts
  bool is_plain() const;      // nothing changed: a stock model
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
// be merged into the expert afterwards) and for every latent slot; rank 0 changes nothing.
std::vector<LayerShape> with_adapters(std::vector<LayerShape> shapes, int64_t rank);
// Per adapter of such a shape, whether it can become part of its expert afterwards: all slots of the expert have it and no other
// layer has the expert. `planned` slots keep theirs.
std::vector<std::vector<uint8_t>> mergeable_adapters(const std::vector<LayerShape>& shapes, const Plan& plan);
// The shapes after recovery, mergeable adapters gone.
std::vector<LayerShape> merged_shapes(const Plan& plan, int64_t rank);

// The three matrices of a stored expert as they are computed; kept from the first to the last of them.
struct ExpertMatrices {
  Tensor gate, up, down;
};
void compute_expert(Plan& plan, int64_t layer, int64_t entry, std::function<ExpertMatrices()> make);

Json to_json(const Plan& plan);
// Error(kInput) starting with `name`. Shapes are not part of the text: they stand in config.json.
Plan plan_from_json(const Json& object, const std::vector<LayerShape>& shapes, const std::string& name);

}  // namespace lightmoe
