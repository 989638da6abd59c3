#include "compress/plan.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "compress/selection.h"
#include "loaders/json.h"

namespace lightmoe {

bool Plan::is_plain() const {
  return std::all_of(layers.begin(), layers.end(),
                     [](const LayerPlan& layer) { return layer.replaced.empty() && layer.adapter_slot.empty(); });
}

bool LayerPlan::fades(int32_t slot) const {
  const Slot& entry = shape.slots[static_cast<size_t>(slot)];
  return entry.kind == SlotKind::kExpert && shape.widths.empty();
}

std::vector<LayerShape> Plan::shapes() const {
  std::vector<LayerShape> out;
  for (const LayerPlan& layer : layers) out.push_back(layer.shape);
  return out;
}

int64_t Plan::replaced() const {
  int64_t sum = 0;
  for (const LayerPlan& layer : layers) sum += static_cast<int64_t>(layer.replaced.size());
  return sum;
}

int64_t Plan::fading() const {
  int64_t sum = 0;
  for (const LayerPlan& layer : layers) {
    for (const int32_t slot : layer.replaced) sum += layer.fades(slot) ? 1 : 0;
  }
  return sum;
}

LayerPlan plain_layer_plan(int64_t num_slots) {
  LayerPlan plan{.shape = plain_layer_shape(num_slots)};
  for (int64_t e = 0; e < num_slots; ++e) plan.bank.push_back({{static_cast<int32_t>(e)}, {1.0}});
  return plan;
}

Plan plain_plan(const ModelSize& size) {
  return {.layers = std::vector<LayerPlan>(static_cast<size_t>(size.layers), plain_layer_plan(size.slots))};
}

LayerPlan replacement_plan(int64_t num_slots, const std::vector<int32_t>& replaced,
                           const std::vector<SlotGroup>& groups, int64_t rank) {
  if (replaced.empty()) return plain_layer_plan(num_slots);
  LayerPlan plan{.replaced = replaced};
  plan.shape.slots.resize(static_cast<size_t>(num_slots));
  std::vector<uint8_t> is_replaced(static_cast<size_t>(num_slots), 0);
  for (const int32_t slot : replaced) is_replaced[static_cast<size_t>(slot)] = 1;
  for (int32_t s = 0; s < num_slots; ++s) {
    if (is_replaced[static_cast<size_t>(s)]) continue;
    plan.shape.slots[static_cast<size_t>(s)].expert = static_cast<int32_t>(plan.bank.size());
    plan.bank.push_back({{s}, {1.0}});
  }
  if (groups.empty()) {
    for (const int32_t slot : replaced) {
      plan.shape.slots[static_cast<size_t>(slot)].expert = static_cast<int32_t>(plan.bank.size());
    }
    plan.bank.push_back({});
  }
  for (const SlotGroup& group : groups) {
    const auto entry = static_cast<int32_t>(plan.bank.size());
    plan.bases.push_back(entry);
    plan.bank.push_back({group.slots, group.weights});
    for (const int32_t slot : group.slots) plan.shape.slots[static_cast<size_t>(slot)].expert = entry;
  }
  for (int32_t s = 0; s < num_slots; ++s) {
    if (!is_replaced[static_cast<size_t>(s)]) continue;
    plan.shape.slots[static_cast<size_t>(s)].adapter = static_cast<int32_t>(plan.adapter_slot.size());
    plan.adapter_slot.push_back(s);
  }
  plan.shape.adapter_rank.assign(plan.adapter_slot.size(), rank);
  for (const BankEntry& entry : plan.bank) plan.shape.zero_expert.push_back(entry.is_zero());
  return plan;
}

LayerPlan table_plan(int64_t num_slots, std::vector<PlannedExpert> experts) {
  for (PlannedExpert& expert : experts) std::sort(expert.slots.begin(), expert.slots.end());
  std::sort(experts.begin(), experts.end(),
            [](const PlannedExpert& a, const PlannedExpert& b) { return a.slots < b.slots; });
  LayerPlan plan;
  plan.shape.slots.assign(static_cast<size_t>(num_slots), Slot{.kind = SlotKind::kRemoved});
  std::vector<uint8_t> is_own(static_cast<size_t>(num_slots), 0);
  for (const PlannedExpert& expert : experts) {
    const auto entry = static_cast<int32_t>(plan.bank.size());
    for (const int32_t slot : expert.slots) {
      plan.shape.slots[static_cast<size_t>(slot)] = {.kind = SlotKind::kExpert, .expert = entry};
      is_own[static_cast<size_t>(slot)] =
          expert.made_of.is_copy() && expert.made_of.layer < 0 && expert.made_of.experts[0] == slot;
    }
    if (expert.slots.size() > 1 || !expert.made_of.is_copy()) plan.bases.push_back(entry);
    plan.bank.push_back(expert.made_of);
    plan.shape.zero_expert.push_back(expert.made_of.is_zero());
  }
  for (int32_t s = 0; s < num_slots; ++s) {
    if (!is_own[static_cast<size_t>(s)]) plan.replaced.push_back(s);
  }
  return plan;
}

std::vector<LayerShape> with_adapters(std::vector<LayerShape> shapes, int64_t rank) {
  if (rank == 0) return shapes;
  for (LayerShape& shape : shapes) {
    std::vector<int32_t> of_expert(shape.zero_expert.size(), -1);
    for (Slot& slot : shape.slots) {
      if (slot.adapter >= 0) continue;
      if (slot.kind == SlotKind::kLatent) {
        slot.adapter = static_cast<int32_t>(shape.adapter_rank.size());
        shape.adapter_rank.push_back(rank);
      }
      if (slot.kind != SlotKind::kExpert) continue;
      int32_t& adapter = of_expert[static_cast<size_t>(slot.expert)];
      if (adapter < 0) {
        adapter = static_cast<int32_t>(shape.adapter_rank.size());
        shape.adapter_rank.push_back(rank);
      }
      slot.adapter = adapter;
    }
  }
  return shapes;
}

std::vector<std::vector<uint8_t>> mergeable_adapters(const std::vector<LayerShape>& shapes, const Plan& plan) {
  std::vector<std::vector<uint8_t>> foreign;  // entries that more than one layer has
  for (const LayerShape& shape : shapes) foreign.emplace_back(shape.zero_expert);
  for (size_t l = 0; l < shapes.size(); ++l) {
    for (size_t j = 0; j < shapes[l].borrowed.size(); ++j) {
      const BankRef& from = shapes[l].borrowed[j];
      if (from.layer < 0) continue;
      foreign[l][j] = foreign[static_cast<size_t>(from.layer)][static_cast<size_t>(from.entry)] = 1;
    }
  }
  std::vector<std::vector<uint8_t>> mergeable;
  for (size_t l = 0; l < shapes.size(); ++l) {
    const LayerShape& shape = shapes[l];
    std::vector<uint8_t>& can = mergeable.emplace_back(shape.adapter_rank.size(), uint8_t{1});
    std::vector<int32_t> adapter_of(shape.zero_expert.size(), -2);
    if (shape.wide_adapters) std::fill(can.begin(), can.end(), uint8_t{0});
    const auto keep = [&](int32_t adapter) {
      if (adapter >= 0) can[static_cast<size_t>(adapter)] = 0;
    };
    for (const Slot& slot : shape.slots) {
      if (slot.kind != SlotKind::kExpert) {
        keep(slot.adapter);
        continue;
      }
      int32_t& first = adapter_of[static_cast<size_t>(slot.expert)];
      if (first == -2) first = slot.adapter;
      if (first != slot.adapter) keep(first), keep(slot.adapter);
      if (foreign[l][static_cast<size_t>(slot.expert)]) keep(slot.adapter);
    }
    for (const int32_t slot : plan.layers[l].adapter_slot) keep(shape.slots[static_cast<size_t>(slot)].adapter);
  }
  return mergeable;
}

std::vector<LayerShape> merged_shapes(const Plan& plan, int64_t rank) {
  std::vector<LayerShape> shapes = with_adapters(plan.shapes(), rank);
  const std::vector<std::vector<uint8_t>> mergeable = mergeable_adapters(shapes, plan);
  for (size_t l = 0; l < shapes.size(); ++l) {
    std::vector<int64_t> kept;
    std::vector<int32_t> new_index;
    for (size_t a = 0; a < mergeable[l].size(); ++a) {
      new_index.push_back(mergeable[l][a] ? -1 : static_cast<int32_t>(kept.size()));
      if (!mergeable[l][a]) kept.push_back(shapes[l].adapter_rank[a]);
    }
    for (Slot& slot : shapes[l].slots) {
      if (slot.adapter >= 0) slot.adapter = new_index[static_cast<size_t>(slot.adapter)];
    }
    shapes[l].adapter_rank = kept;
  }
  return shapes;
}

void compute_expert(Plan& plan, int64_t layer, int64_t entry, std::function<ExpertMatrices()> make) {
  const auto made = std::make_shared<std::optional<ExpertMatrices>>();
  const auto shared_make = std::make_shared<std::function<ExpertMatrices()>>(std::move(make));
  for (const ExpertMatrix matrix : kExpertMatrices) {
    plan.computed[bank_tensor_name(layer, entry, matrix)] = [made, shared_make, matrix] {
      if (!made->has_value()) *made = (*shared_make)();
      const ExpertMatrices& all = **made;
      const Tensor result = matrix == ExpertMatrix::kGate ? all.gate : matrix == ExpertMatrix::kUp ? all.up : all.down;
      if (matrix == ExpertMatrix::kDown) made->reset();  // written last
      return result;
    };
  }
}

Json to_json(const Plan& plan) {
  Json layers = Json::array();
  for (const LayerPlan& layer : plan.layers) {
    Json bank = Json::array();
    for (const BankEntry& entry : layer.bank) {
      bank.push_back(Json{{"experts", entry.experts}, {"weights", entry.weights}});
      if (entry.layer >= 0) bank.back()["layer"] = entry.layer;
    }
    layers.push_back(Json{{"threshold", layer.threshold},
                          {"replaced", layer.replaced},
                          {"bases", layer.bases},
                          {"adapter_slots", layer.adapter_slot},
                          {"bank", bank}});
  }
  Json out = {{"base_threshold", plan.base_threshold}, {"layers", layers}};
  if (plan.experts_to_keep > 0) out["experts_to_keep"] = plan.experts_to_keep;
  if (plan.units_go_in_recovery) out["units_go_in_recovery"] = true;
  return out;
}

namespace {

std::vector<int32_t> indices(const Json& object, const char* key, int64_t limit, const std::string& where) {
  check(object.is_object() && object.contains(key) && object[key].is_array(), ErrorKind::kInput,
        "{}: \"{}\" is not a list", where, key);
  std::vector<int32_t> out;
  for (const Json& value : object[key]) {
    check(value.is_number_integer() && value >= 0 && value < limit, ErrorKind::kInput,
          "{}: {} holds {}, expected 0 to {}", where, key, value.dump(), limit - 1);
    out.push_back(value.get<int32_t>());
  }
  return out;
}

double number(const Json& object, const char* key, const std::string& where) {
  check(object.contains(key) && object[key].is_number(), ErrorKind::kInput, "{}: \"{}\" is not a number", where, key);
  return object[key].get<double>();
}

LayerPlan layer_from_json(const Json& object, const LayerShape& shape, int64_t layers, const std::string& where) {
  const auto slots = static_cast<int64_t>(shape.slots.size()), entries = static_cast<int64_t>(shape.zero_expert.size());
  LayerPlan layer{.shape = shape};
  layer.replaced = indices(object, "replaced", slots, where);
  layer.bases = indices(object, "bases", entries, where);
  layer.adapter_slot = indices(object, "adapter_slots", slots, where);
  layer.threshold = number(object, "threshold", where);
  check(object.contains("bank") && object["bank"].is_array() && object["bank"].size() == shape.zero_expert.size(),
        ErrorKind::kInput, "{}: \"bank\" does not have the {} entries of config.json", where, entries);
  for (const Json& entry : object["bank"]) {
    BankEntry& made = layer.bank.emplace_back();
    made.experts = indices(entry, "experts", slots, where);
    if (entry.contains("layer")) {
      check(entry["layer"].is_number_integer() && entry["layer"] >= 0 && entry["layer"] < layers, ErrorKind::kInput,
            "{}: layer holds {}, expected 0 to {}", where, entry["layer"].dump(), layers - 1);
      made.layer = entry["layer"].get<int32_t>();
    }
    check(entry.contains("weights") && entry["weights"].is_array() && entry["weights"].size() == made.experts.size(),
          ErrorKind::kInput, "{}: \"weights\" does not match \"experts\"", where);
    for (const Json& weight : entry["weights"]) {
      check(weight.is_number(), ErrorKind::kInput, "{}: weight {} is not a number", where, weight.dump());
      made.weights.push_back(weight.get<double>());
    }
  }
  check(layer.adapter_slot.size() == shape.adapter_rank.size(), ErrorKind::kInput,
        "{}: {} adapter_slots, config.json has {} adapters", where, layer.adapter_slot.size(),
        shape.adapter_rank.size());
  return layer;
}

}  // namespace

Plan plan_from_json(const Json& object, const std::vector<LayerShape>& shapes, const std::string& name) {
  check(object.is_object() && object.contains("layers") && object["layers"].is_array() &&
            object["layers"].size() == shapes.size(),
        ErrorKind::kInput, "{}: \"plan\" does not have the {} layers of config.json", name, shapes.size());
  Plan plan{.base_threshold = number(object, "base_threshold", name)};
  if (object.contains("experts_to_keep")) {
    const Json& keep = object["experts_to_keep"];
    const auto slots = static_cast<int64_t>(shapes.front().slots.size());
    check(keep.is_number_integer() && keep >= 1 && keep <= slots, ErrorKind::kInput,
          "{}: experts_to_keep holds {}, expected 1 to {}", name, keep.dump(), slots);
    plan.experts_to_keep = keep.get<int64_t>();
  }
  if (object.contains("units_go_in_recovery")) {
    check(object["units_go_in_recovery"].is_boolean(), ErrorKind::kInput, "{}: units_go_in_recovery is {}", name,
          object["units_go_in_recovery"].dump());
    plan.units_go_in_recovery = object["units_go_in_recovery"].get<bool>();
  }
  for (size_t l = 0; l < shapes.size(); ++l) {
    plan.layers.push_back(layer_from_json(object["layers"][l], shapes[l], static_cast<int64_t>(shapes.size()),
                                          fmt::format("{}: plan.layers[{}]", name, l)));
  }
  return plan;
}

}  // namespace lightmoe
