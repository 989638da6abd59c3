#include "model/slot_table.h"

#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr int kFormat = 1;
constexpr int64_t kMaxRank = 1 << 16;
constexpr const char* kKindNames[] = {"expert", "constant", "latent", "removed"};
constexpr const char* kProjections[] = {"gate_proj", "up_proj", "down_proj"};
constexpr const char* kShortNames[] = {"gate", "up", "down"};

// One layer's object, with messages that say where.
class LayerReader {
 public:
  LayerReader(const Json& layer, const OlmoeConfig& config, std::string where)
      : layer_(layer), config_(config), where_(std::move(where)) {}

  LayerShape read() {
    check(layer_.is_object(), ErrorKind::kInput, "{} is not an object", where_);
    LayerShape shape;
    shape.zero_expert.assign(static_cast<size_t>(integer(member(layer_, "experts"), "experts", 0, config_.num_experts)),
                             0);
    const auto entries = static_cast<int64_t>(shape.zero_expert.size());
    if (layer_.contains("zero_experts")) {
      for (const Json& e : array(layer_, "zero_experts")) {
        shape.zero_expert[static_cast<size_t>(integer(e, "zero_experts", 0, entries - 1))] = 1;
      }
    }
    for (const Json& rank : array(layer_, "adapters")) {
      shape.adapter_rank.push_back(integer(rank, "adapters", 1, kMaxRank));
    }
    read_slots(member(layer_, "slots"), entries, shape);
    return shape;
  }

 private:
  void read_slots(const Json& slots, int64_t entries, LayerShape& shape) {
    const Json& experts = array(slots, "expert");
    const Json& adapters = array(slots, "adapter");
    const auto count = static_cast<size_t>(config_.num_experts);
    check(experts.size() == count && adapters.size() == count, ErrorKind::kInput,
          "{}: slots.expert has {} and slots.adapter {} entries, expected {} (config.json: num_experts)", where_,
          experts.size(), adapters.size(), count);
    const auto num_adapters = static_cast<int64_t>(shape.adapter_rank.size());
    std::vector<int32_t> expert_of_adapter(shape.adapter_rank.size(), -1);
    int64_t live = 0;
    for (size_t i = 0; i < count; ++i) {
      Slot slot;
      slot.expert = static_cast<int32_t>(integer(experts[i], "slots.expert", -1, entries - 1));
      slot.adapter = static_cast<int32_t>(integer(adapters[i], "slots.adapter", -1, num_adapters - 1));
      if (slots.contains("kind")) slot.kind = kind(array(slots, "kind"), i, count);
      check(slot.kind != SlotKind::kExpert || slot.expert >= 0, ErrorKind::kInput, "{}: slot {} points to no expert",
            where_, i);
      if (slot.adapter >= 0) {
        int32_t& owner = expert_of_adapter[static_cast<size_t>(slot.adapter)];
        check(owner < 0 || owner == slot.expert, ErrorKind::kInput,
              "{}: adapter {} belongs to slots of two experts ({} and {})", where_, slot.adapter, owner, slot.expert);
        owner = slot.expert;
      }
      live += slot.kind != SlotKind::kRemoved ? 1 : 0;
      shape.slots.push_back(slot);
    }
    check(live >= config_.num_experts_per_token, ErrorKind::kInput,
          "{}: {} slots are not removed, a token chooses {} (num_experts_per_tok)", where_, live,
          config_.num_experts_per_token);
  }

  SlotKind kind(const Json& kinds, size_t i, size_t count) const {
    check(kinds.size() == count, ErrorKind::kInput, "{}: slots.kind has {} entries, expected {}", where_, kinds.size(),
          count);
    for (int k = 0; k < 4; ++k) {
      if (kinds[i].is_string() && kinds[i].get_ref<const std::string&>() == kKindNames[k])
        return static_cast<SlotKind>(k);
    }
    fail(ErrorKind::kInput, "{}: slots.kind[{}] is {}, expected expert, constant, latent or removed", where_, i,
         kinds[i].dump());
  }
  const Json& member(const Json& object, const char* key) const {
    check(object.is_object() && object.contains(key), ErrorKind::kInput, "{}: key \"{}\" is missing", where_, key);
    return object[key];
  }
  const Json& array(const Json& object, const char* key) const {
    const Json& value = member(object, key);
    check(value.is_array(), ErrorKind::kInput, "{}: \"{}\" is not a list", where_, key);
    return value;
  }
  int64_t integer(const Json& value, const char* key, int64_t low, int64_t high) const {
    check(value.is_number_integer(), ErrorKind::kInput, "{}: {} holds {}, expected an integer", where_, key,
          value.dump());
    const bool huge = value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{1} << 62;
    const int64_t number = huge ? int64_t{1} << 62 : value.get<int64_t>();
    check(number >= low && number <= high, ErrorKind::kInput, "{}: {} holds {}, expected {} to {}", where_, key, number,
          low, high);
    return number;
  }

  const Json& layer_;
  const OlmoeConfig& config_;
  std::string where_;
};

}  // namespace

LayerShape plain_layer_shape(int64_t num_slots) {
  LayerShape shape;
  for (int64_t i = 0; i < num_slots; ++i) shape.slots.push_back(Slot{.expert = static_cast<int32_t>(i)});
  shape.zero_expert.assign(static_cast<size_t>(num_slots), 0);
  return shape;
}

LayerShape shape_of(const MoeLayer& layer) {
  LayerShape shape{.slots = layer.slots};
  for (const Expert& expert : layer.experts) shape.zero_expert.push_back(expert.gate_up == nullptr);
  for (const Adapter& adapter : layer.adapters) shape.adapter_rank.push_back(adapter.rank());
  return shape;
}

Json slot_tables_to_json(const std::vector<LayerShape>& layers, const Json& method) {
  Json out = {{"format", kFormat}, {"method", method}, {"layers", Json::array()}};
  for (const LayerShape& shape : layers) {
    Json zero = Json::array(), experts = Json::array(), adapters = Json::array(), kinds = Json::array();
    for (size_t i = 0; i < shape.zero_expert.size(); ++i) {
      if (shape.zero_expert[i]) zero.push_back(i);
    }
    bool all_experts = true;
    for (const Slot& slot : shape.slots) {
      experts.push_back(slot.expert);
      adapters.push_back(slot.adapter);
      kinds.push_back(kKindNames[static_cast<int>(slot.kind)]);
      all_experts = all_experts && slot.kind == SlotKind::kExpert;
    }
    Json slots = {{"expert", experts}, {"adapter", adapters}};
    if (!all_experts) slots["kind"] = kinds;
    out["layers"].push_back({{"experts", shape.zero_expert.size()},
                             {"zero_experts", zero},
                             {"adapters", shape.adapter_rank},
                             {"slots", slots}});
  }
  return out;
}

std::vector<LayerShape> slot_tables_from_json(const Json& object, const OlmoeConfig& config, const std::string& name) {
  check(object.is_object(), ErrorKind::kInput, "{}: \"lightmoe\" is not an object", name);
  check(object.contains("format") && object["format"] == kFormat, ErrorKind::kInput,
        "{}: lightmoe.format is {}, this version reads format {}", name,
        object.contains("format") ? object["format"].dump() : "missing", kFormat);
  check(object.contains("layers") && object["layers"].is_array(), ErrorKind::kInput, "{}: lightmoe.layers is missing",
        name);
  const Json& layers = object["layers"];
  check(static_cast<int64_t>(layers.size()) == config.num_layers, ErrorKind::kInput,
        "{}: lightmoe.layers has {} entries, expected {} (num_hidden_layers)", name, layers.size(), config.num_layers);
  std::vector<LayerShape> shapes;
  for (size_t l = 0; l < layers.size(); ++l) {
    shapes.push_back(LayerReader(layers[l], config, fmt::format("{}: lightmoe.layers[{}]", name, l)).read());
  }
  return shapes;
}

std::string expert_tensor_name(int64_t layer, int64_t expert, ExpertMatrix matrix) {
  return fmt::format("model.layers.{}.mlp.experts.{}.{}.weight", layer, expert, kProjections[static_cast<int>(matrix)]);
}
std::string bank_tensor_name(int64_t layer, int64_t entry, ExpertMatrix matrix) {
  return fmt::format("model.layers.{}.mlp.bank.{}.{}.weight", layer, entry, kProjections[static_cast<int>(matrix)]);
}
std::string adapter_tensor_name(int64_t layer, int64_t adapter, ExpertMatrix matrix, bool b) {
  return fmt::format("model.layers.{}.mlp.adapters.{}.{}_{}", layer, adapter, kShortNames[static_cast<int>(matrix)],
                     b ? "b" : "a");
}

}  // namespace lightmoe
