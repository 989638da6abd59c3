#include "model/slot_table.h"

#include <algorithm>

#include "loaders/json.h"
#include "model/moe_extension.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr int kFormat = 1;
constexpr int64_t kMaxRank = 1 << 16;
constexpr const char* kMix = "silu";
constexpr const char* kKindNames[] = {"expert", "constant", "latent", "removed"};
constexpr const char* kProjections[] = {"gate_proj", "up_proj", "down_proj"};
constexpr const char* kShortNames[] = {"gate", "up", "down"};

// One layer's object, with messages that say where.
class LayerReader {
 public:
  // `below`: the shapes of the layers before this one.
  LayerReader(const Json& layer, const OlmoeConfig& config, const std::vector<LayerShape>& below, std::string where)
      : layer_(layer), config_(config), below_(below), where_(std::move(where)) {}

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
    if (layer_.contains("widths")) read_widths(shape);
    if (layer_.contains("wide_adapters")) {
      check(layer_["wide_adapters"].is_boolean(), ErrorKind::kInput, "{}: wide_adapters is {}, expected true or false",
            where_, layer_["wide_adapters"].dump());
      shape.wide_adapters = layer_["wide_adapters"].get<bool>();
    }
    if (layer_.contains("borrowed")) read_borrowed(shape);
    if (layer_.contains("constants")) {
      shape.constants = integer(layer_["constants"], "constants", 1, config_.num_experts);
    }
    if (layer_.contains("latents")) read_latents(member(layer_, "latents"), shape);
    read_slots(member(layer_, "slots"), entries, shape);
    if (layer_.contains("extension")) {
      shape.extension = extension_from_json(layer_["extension"], where_);
      check_extension(shape.extension, config_, ErrorKind::kInput, where_);
    }
    return shape;
  }

 private:
  void read_widths(LayerShape& shape) {
    const Json& widths = array(layer_, "widths");
    check(widths.size() == shape.zero_expert.size(), ErrorKind::kInput,
          "{}: widths has {} entries, expected {} (experts)", where_, widths.size(), shape.zero_expert.size());
    for (size_t j = 0; j < widths.size(); ++j) {
      const int64_t least = shape.zero_expert[j] ? config_.intermediate_size : 1;
      shape.widths.push_back(integer(widths[j], "widths", least, config_.intermediate_size));
    }
  }

  void read_borrowed(LayerShape& shape) {
    shape.borrowed.resize(shape.zero_expert.size());
    const auto entries = static_cast<int64_t>(shape.zero_expert.size());
    for (const Json& item : array(layer_, "borrowed")) {
      check(item.is_array() && item.size() == 3, ErrorKind::kInput,
            "{}: borrowed holds {}, expected [entry, layer, entry there]", where_, item.dump());
      const auto entry = static_cast<size_t>(integer(item[0], "borrowed", 0, entries - 1));
      check(!shape.zero_expert[entry] && shape.borrowed[entry].layer < 0, ErrorKind::kInput,
            "{}: entry {} is borrowed twice, or is zero", where_, entry);
      const int64_t layer = integer(item[1], "borrowed (layer)", 0, static_cast<int64_t>(below_.size()) - 1);
      const LayerShape& from = below_[static_cast<size_t>(layer)];
      const int64_t there =
          integer(item[2], "borrowed (entry there)", 0, static_cast<int64_t>(from.zero_expert.size()) - 1);
      check(from.stores(static_cast<size_t>(there)), ErrorKind::kInput, "{}: layer {} does not store its entry {}",
            where_, layer, there);
      const int64_t full = config_.intermediate_size, width = shape.width_of(entry, full),
                    owned = from.width_of(static_cast<size_t>(there), full);
      check(width == owned, ErrorKind::kInput, "{}: entry {} has width {}, entry {} of layer {}, which stores it, {}",
            where_, entry, width, there, layer, owned);
      shape.borrowed[entry] = {static_cast<int32_t>(layer), static_cast<int32_t>(there)};
    }
  }

  void read_latents(const Json& latents, LayerShape& shape) {
    shape.latent_size = integer(member(latents, "size"), "latents.size", 1, config_.hidden_size);
    shape.projections = integer(member(latents, "projections"), "latents.projections", 1, config_.num_experts);
    if (latents.contains("mix")) {
      check(latents["mix"] == kMix, ErrorKind::kInput, "{}: latents.mix is {}, expected \"{}\"", where_,
            latents["mix"].dump(), kMix);
      shape.latent_mix = true;
    }
    if (latents.contains("down")) {
      check(latents["down"].is_boolean(), ErrorKind::kInput, "{}: latents.down is {}, expected true or false", where_,
            latents["down"].dump());
      shape.latent_down = latents["down"].get<bool>();
    }
    if (latents.contains("rank")) {
      check(shape.latent_mix, ErrorKind::kInput, "{}: latents.rank without latents.mix", where_);
      shape.projection_rank = integer(latents["rank"], "latents.rank", 1, shape.latent_size - 1);
    }
    const int64_t first = shape.latent_mix ? -1 : 0, last = shape.latent_mix ? -1 : shape.projections - 1;
    for (const Json& projection : array(latents, "projection")) {
      shape.latent_projection.push_back(static_cast<int32_t>(integer(projection, "latents.projection", first, last)));
    }
    check(
        !shape.latent_projection.empty() && shape.latent_projection.size() <= static_cast<size_t>(config_.num_experts),
        ErrorKind::kInput, "{}: {} latents, expected 1 to {}", where_, shape.latent_projection.size(),
        config_.num_experts);
  }

  void read_slots(const Json& slots, int64_t entries, LayerShape& shape) {
    const Json& experts = array(slots, "expert");
    const Json& adapters = array(slots, "adapter");
    const auto count = static_cast<size_t>(config_.num_experts);
    check(experts.size() == count && adapters.size() == count, ErrorKind::kInput,
          "{}: slots.expert has {} and slots.adapter {} entries, expected {} (config.json: num_experts)", where_,
          experts.size(), adapters.size(), count);
    const auto num_adapters = static_cast<int64_t>(shape.adapter_rank.size());
    std::vector<int32_t> owner_of_adapter(shape.adapter_rank.size(), -1);  // an expert, or beyond them a latent
    const auto config_experts = static_cast<int32_t>(config_.num_experts);
    int64_t live = 0;
    for (size_t i = 0; i < count; ++i) {
      Slot slot;
      slot.expert = static_cast<int32_t>(integer(experts[i], "slots.expert", -1, entries - 1));
      slot.adapter = static_cast<int32_t>(integer(adapters[i], "slots.adapter", -1, num_adapters - 1));
      if (slots.contains("kind")) slot.kind = kind(array(slots, "kind"), i, count);
      if (slot.kind == SlotKind::kConstant) slot.constant = index(slots, "constant", i, count, shape.constants);
      if (slot.kind == SlotKind::kLatent) {
        slot.latent = index(slots, "latent", i, count, static_cast<int64_t>(shape.latent_projection.size()));
      }
      const bool may_adapt = slot.kind == SlotKind::kExpert || slot.kind == SlotKind::kLatent;
      check(may_adapt || slot.adapter < 0, ErrorKind::kInput, "{}: slot {} is of kind {} and has an adapter", where_, i,
            kKindNames[static_cast<int>(slot.kind)]);
      check(slot.kind != SlotKind::kExpert || slot.expert >= 0, ErrorKind::kInput, "{}: slot {} points to no expert",
            where_, i);
      if (slot.adapter >= 0) {
        int32_t& owner = owner_of_adapter[static_cast<size_t>(slot.adapter)];
        const int32_t here = slot.kind == SlotKind::kLatent ? config_experts + slot.latent : slot.expert;
        check(owner < 0 || owner == here, ErrorKind::kInput,
              "{}: adapter {} belongs to slots of two experts ({} and {})", where_, slot.adapter, owner, here);
        owner = here;
      }
      live += slot.kind != SlotKind::kRemoved ? 1 : 0;
      shape.slots.push_back(slot);
    }
    check(live >= config_.num_experts_per_token, ErrorKind::kInput,
          "{}: {} slots are not removed, a token chooses {} (num_experts_per_tok)", where_, live,
          config_.num_experts_per_token);
  }

  int32_t index(const Json& slots, const char* key, size_t i, size_t count, int64_t limit) const {
    const Json& list = array(slots, key);
    check(list.size() == count, ErrorKind::kInput, "{}: slots.{} has {} entries, expected {}", where_, key, list.size(),
          count);
    check(limit > 0, ErrorKind::kInput, "{}: slot {} is of kind {}, but the layer stores none", where_, i, key);
    return static_cast<int32_t>(integer(list[i], key, 0, limit - 1));
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
  const std::vector<LayerShape>& below_;
  std::string where_;
};

}  // namespace

LayerShape plain_layer_shape(int64_t num_slots) {
  LayerShape shape;
  for (int64_t i = 0; i < num_slots; ++i) shape.slots.push_back(Slot{.expert = static_cast<int32_t>(i)});
  shape.zero_expert.assign(static_cast<size_t>(num_slots), 0);
  return shape;
}

int64_t LayerShape::width_of_adapter(size_t adapter, int64_t full) const {
  if (widths.empty() || wide_adapters) return full;
  for (const Slot& slot : slots) {
    if (slot.adapter != static_cast<int32_t>(adapter)) continue;
    return slot.kind == SlotKind::kExpert ? widths[static_cast<size_t>(slot.expert)] : full;
  }
  return full;
}

int64_t LayerShape::projection_parameters(int64_t hidden) const {
  const int64_t k = projection_rows();
  return latent_matrices() * (k * hidden + (latent_size - k) * k);
}

int64_t LayerShape::latent_parameters(int64_t hidden, int64_t full) const {
  const int64_t factors = latent_matrices() * full * latent_size;
  return factors + (latent_down ? 0 : hidden * full) + (latent_mix ? latent_matrices() * projections : 0);
}

LayerShape shape_of(const MoeLayer& layer, int64_t full_width) {
  LayerShape shape{.slots = layer.slots};
  for (const Expert& expert : layer.experts) {
    shape.zero_expert.push_back(expert.gate_up == nullptr);
    shape.widths.push_back(expert.down == nullptr ? full_width : expert.down->value.dim(1));
  }
  const auto is_full = [full_width](int64_t width) { return width == full_width; };
  if (std::all_of(shape.widths.begin(), shape.widths.end(), is_full)) shape.widths.clear();
  for (const Adapter& adapter : layer.adapters) shape.adapter_rank.push_back(adapter.rank());
  for (const Slot& slot : layer.slots) {
    if (shape.widths.empty() || slot.kind != SlotKind::kExpert || slot.adapter < 0) continue;
    const int64_t width = layer.adapters[static_cast<size_t>(slot.adapter)].b_gate->value.dim(0);
    shape.wide_adapters = shape.wide_adapters || width > shape.widths[static_cast<size_t>(slot.expert)];
  }
  if (layer.constants != nullptr) shape.constants = layer.constants->value.dim(0);
  if (layer.extension != nullptr) shape.extension = layer.extension->shape();
  shape.projections = static_cast<int64_t>(layer.projections.size());
  for (const Latent& latent : layer.latents) {
    shape.latent_projection.push_back(latent.projection);
    shape.latent_size = latent.a_gate->value.dim(1);
    shape.latent_down = latent.a_down != nullptr, shape.latent_mix = latent.mix != nullptr;
  }
  if (!layer.projections.empty() && layer.projections.front().left_gate_up != nullptr) {
    shape.projection_rank = layer.projections.front().left_gate_up->value.dim(1);
  }
  return shape;
}

namespace {

Json latents_to_json(const LayerShape& shape) {
  Json json = {
      {"size", shape.latent_size}, {"projections", shape.projections}, {"projection", shape.latent_projection}};
  if (shape.latent_down) json["down"] = true;
  if (shape.latent_mix) json["mix"] = kMix;
  if (shape.projection_rank > 0) json["rank"] = shape.projection_rank;
  return json;
}

}  // namespace

Json slot_tables_to_json(const std::vector<LayerShape>& layers, const Json& method) {
  Json out = {{"format", kFormat}, {"method", method}, {"layers", Json::array()}};
  for (const LayerShape& shape : layers) {
    Json zero = Json::array(), experts = Json::array(), adapters = Json::array(), kinds = Json::array();
    Json constants = Json::array(), latents = Json::array(), borrowed = Json::array();
    for (size_t i = 0; i < shape.zero_expert.size(); ++i) {
      if (shape.zero_expert[i]) zero.push_back(i);
    }
    bool all_experts = true;
    for (const Slot& slot : shape.slots) {
      experts.push_back(slot.expert);
      adapters.push_back(slot.adapter);
      kinds.push_back(kKindNames[static_cast<int>(slot.kind)]);
      constants.push_back(slot.constant);
      latents.push_back(slot.latent);
      all_experts = all_experts && slot.kind == SlotKind::kExpert;
    }
    Json slots = {{"expert", experts}, {"adapter", adapters}};
    if (!all_experts) slots["kind"] = kinds;
    if (shape.constants > 0) slots["constant"] = constants;
    if (shape.has_latents()) slots["latent"] = latents;
    Json layer = {{"experts", shape.zero_expert.size()},
                  {"zero_experts", zero},
                  {"adapters", shape.adapter_rank},
                  {"slots", slots}};
    for (size_t j = 0; j < shape.borrowed.size(); ++j) {
      const BankRef& from = shape.borrowed[j];
      if (from.layer >= 0) borrowed.push_back({j, from.layer, from.entry});
    }
    if (!borrowed.empty()) layer["borrowed"] = borrowed;
    if (!shape.widths.empty()) layer["widths"] = shape.widths;
    if (shape.wide_adapters) layer["wide_adapters"] = true;
    if (shape.constants > 0) layer["constants"] = shape.constants;
    if (shape.has_latents()) layer["latents"] = latents_to_json(shape);
    if (shape.extension.any()) layer["extension"] = extension_to_json(shape.extension);
    out["layers"].push_back(layer);
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
    shapes.push_back(LayerReader(layers[l], config, shapes, fmt::format("{}: lightmoe.layers[{}]", name, l)).read());
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

std::string constants_tensor_name(int64_t layer) { return fmt::format("model.layers.{}.mlp.constants", layer); }
std::string projection_tensor_name(int64_t layer, int64_t projection, ExpertMatrix matrix) {
  return fmt::format("model.layers.{}.mlp.projections.{}.{}", layer, projection, kShortNames[static_cast<int>(matrix)]);
}
std::string left_tensor_name(int64_t layer, int64_t projection, ExpertMatrix matrix) {
  return projection_tensor_name(layer, projection, matrix) + "_left";
}
std::string mix_tensor_name(int64_t layer, int64_t latent) {
  return fmt::format("model.layers.{}.mlp.latents.{}.mix", layer, latent);
}
std::string latent_tensor_name(int64_t layer, int64_t latent, ExpertMatrix matrix) {
  return fmt::format("model.layers.{}.mlp.latents.{}.{}", layer, latent, kShortNames[static_cast<int>(matrix)]);
}

}  // namespace lightmoe
