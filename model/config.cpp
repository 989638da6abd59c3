#include "model/config.h"

#include <cmath>

#include "loaders/json.h"
#include "loaders/output.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr JsonLimits kConfigLimits{.max_bytes = int64_t{16} << 20, .max_depth = 64, .max_values = 1'000'000};
// Caps far above any model; their product, the number of expert parameters, stays under 2^61.
constexpr int64_t kMaxWidth = 1 << 17, kMaxLayers = 1 << 10, kMaxExperts = 1 << 14, kMaxVocab = 1 << 24,
                  kMaxPositions = 1 << 28;

// Typed access to the keys of one object; messages are "file: key is VALUE, expected RANGE".
class Keys {
 public:
  Keys(const Json& object, std::string name) : object_(object), name_(std::move(name)) {
    check(object.is_object(), ErrorKind::kInput, "{}: is {}, expected an object", name_, object.type_name());
  }

  const Json* find(const char* key) const {  // null counts as absent
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  [[noreturn]] void refuse(const char* key, const Json& value, const std::string& expected) const {
    fail(ErrorKind::kInput, "{}: {} is {}, expected {}", name_, key, shown(value), expected);
  }

  std::optional<int64_t> integer(const char* key, int64_t low, int64_t high) const {
    const Json* value = find(key);
    if (value == nullptr) return {};
    if (!fits(*value, low, high)) refuse(key, *value, fmt::format("an integer from {} to {}", low, high));
    return value->get<int64_t>();
  }
  int64_t required(const char* key, int64_t low, int64_t high) const {
    const std::optional<int64_t> value = integer(key, low, high);
    check(value.has_value(), ErrorKind::kInput, "{}: {} is missing, expected an integer from {} to {}", name_, key, low,
          high);
    return *value;
  }
  // Some keys have two names; when both are there they must agree.
  int64_t required_either(const char* key, const char* other, int64_t low, int64_t high) const {
    const std::optional<int64_t> first = integer(key, low, high), second = integer(other, low, high);
    check(first || second, ErrorKind::kInput, "{}: {} (or {}) is missing, expected an integer from {} to {}", name_,
          key, other, low, high);
    check(!first || !second || *first == *second, ErrorKind::kInput, "{}: {} is {} but {} is {}", name_, key,
          first.value_or(0), other, second.value_or(0));
    return first ? *first : *second;
  }
  std::optional<double> number(const char* key, double low, double high) const {  // low < value <= high
    const Json* value = find(key);
    if (value == nullptr) return {};
    const double v = value->is_number() ? value->get<double>() : std::nan("");
    if (!(v > low && v <= high)) refuse(key, *value, fmt::format("a number above {} and at most {}", low, high));
    return v;
  }
  bool boolean(const char* key, bool otherwise) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) refuse(key, *value, "true or false");
    return value->get<bool>();
  }
  std::optional<std::string> text(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr) return {};
    if (!value->is_string()) refuse(key, *value, "a string");
    return value->get<std::string>();
  }

  static bool fits(const Json& value, int64_t low, int64_t high) {
    if (value.is_number_unsigned())
      return value.get<uint64_t>() <= static_cast<uint64_t>(high) && value.get<int64_t>() >= low;
    return value.is_number_integer() && value.get<int64_t>() >= low && value.get<int64_t>() <= high;
  }
  static std::string shown(const Json& value) {
    return printable(value.dump(-1, ' ', true, Json::error_handler_t::replace), 80);
  }
  const std::string& name() const { return name_; }

 private:
  const Json& object_;
  std::string name_;
};

constexpr int64_t kMaxTokenId = (int64_t{1} << 31) - 1;

void read_token_ids(const Keys& keys, OlmoeConfig& config) {
  if (const Json* eos = keys.find("eos_token_id")) {
    config.eos_token_ids.clear();
    const Json list = eos->is_array() ? *eos : Json::array({*eos});
    for (const Json& id : list) {
      if (!Keys::fits(id, 0, kMaxTokenId)) keys.refuse("eos_token_id", *eos, "a token id or a list of token ids");
      config.eos_token_ids.push_back(id.get<int64_t>());
    }
  }
  if (const auto pad = keys.integer("pad_token_id", -1, kMaxTokenId)) config.pad_token_id = *pad;
  if (const auto bos = keys.integer("bos_token_id", -1, kMaxTokenId)) config.bos_token_id = *bos;
}

void check_architecture(const Keys& keys) {
  const auto type = keys.text("model_type");
  if (type && *type != "olmoe") keys.refuse("model_type", *keys.find("model_type"), "\"olmoe\"");
  const Json* architectures = keys.find("architectures");
  if (architectures == nullptr) {
    check(type.has_value(), ErrorKind::kInput,
          "{}: neither model_type nor architectures, expected \"olmoe\" and [\"OlmoeForCausalLM\"]", keys.name());
  } else if (!architectures->is_array() || architectures->size() != 1 || (*architectures)[0] != "OlmoeForCausalLM") {
    keys.refuse("architectures", *architectures, "[\"OlmoeForCausalLM\"]");
  }
  if (keys.boolean("attention_bias", false))
    keys.refuse("attention_bias", Json(true), "false: OLMoE has no attention bias");
  if (const auto act = keys.text("hidden_act"); act && *act != "silu") {
    keys.refuse("hidden_act", *keys.find("hidden_act"), "\"silu\"");
  }
  if (keys.find("quantization_config")) {
    keys.refuse("quantization_config", *keys.find("quantization_config"), "none: quantized checkpoints are not read");
  }
}

// rope_theta (transformers 4) or rope_parameters {"rope_type", "rope_theta"} (5); any scaling of positions is refused.
void read_rope(const Keys& keys, OlmoeConfig& config) {
  constexpr double kMaxTheta = 1e12;
  const auto theta = keys.number("rope_theta", 0, kMaxTheta);
  if (theta) config.rope_theta = *theta;
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json* value = keys.find(key);
    if (value == nullptr) continue;
    const Keys rope(*value, keys.name() + ": " + key);
    for (const char* type_key : {"rope_type", "type"}) {
      const auto type = rope.text(type_key);
      if (type && *type != "default")
        rope.refuse(type_key, *rope.find(type_key), "\"default\": RoPE scaling is not supported");
    }
    if (const auto inner = rope.number("rope_theta", 0, kMaxTheta)) {
      check(!theta || *theta == *inner, ErrorKind::kInput, "{}: rope_theta is {} but {}.rope_theta is {}", keys.name(),
            config.rope_theta, key, *inner);
      config.rope_theta = *inner;
    }
  }
}

void read_sizes(const Keys& keys, OlmoeConfig& c) {
  c.vocab_size = keys.required("vocab_size", 1, kMaxVocab);
  c.hidden_size = keys.required("hidden_size", 1, kMaxWidth);
  c.intermediate_size = keys.required("intermediate_size", 1, kMaxWidth);
  c.num_layers = keys.required("num_hidden_layers", 1, kMaxLayers);
  c.num_heads = keys.required("num_attention_heads", 1, c.hidden_size);
  c.num_kv_heads = keys.integer("num_key_value_heads", 1, c.num_heads).value_or(c.num_heads);
  c.num_experts = keys.required_either("num_experts", "num_local_experts", 1, kMaxExperts);
  c.num_experts_per_token = keys.required("num_experts_per_tok", 1, c.num_experts);
  c.max_position_embeddings = keys.required("max_position_embeddings", 1, kMaxPositions);
  check(c.hidden_size % c.num_heads == 0 && c.head_dim() % 2 == 0, ErrorKind::kInput,
        "{}: num_attention_heads is {}, hidden_size is {}: expected heads of equal, even width", keys.name(),
        c.num_heads, c.hidden_size);
  check(c.num_heads % c.num_kv_heads == 0, ErrorKind::kInput,
        "{}: num_key_value_heads is {}, expected a divisor of num_attention_heads {}", keys.name(), c.num_kv_heads,
        c.num_heads);
  if (const auto head_dim = keys.integer("head_dim", 1, kMaxWidth)) {
    check(*head_dim == c.head_dim(), ErrorKind::kInput,
          "{}: head_dim is {}, expected hidden_size / num_attention_heads = {}", keys.name(), *head_dim, c.head_dim());
  }
}

}  // namespace

OlmoeConfig parse_config(const std::string& json, const std::string& name_for_messages) {
  const Json root = parse_json(json, name_for_messages, kConfigLimits);
  const Keys keys(root, name_for_messages);
  check_architecture(keys);
  OlmoeConfig config;
  read_sizes(keys, config);
  read_rope(keys, config);
  read_token_ids(keys, config);
  config.rms_norm_eps = keys.number("rms_norm_eps", 0, 1).value_or(config.rms_norm_eps);
  config.clip_qkv = keys.number("clip_qkv", 0, 1e30);
  config.norm_topk_prob = keys.boolean("norm_topk_prob", false);
  config.tie_word_embeddings = keys.boolean("tie_word_embeddings", false);
  config.router_aux_loss_coef = keys.number("router_aux_loss_coef", -1e-300, 1e6).value_or(config.router_aux_loss_coef);
  config.initializer_range = keys.number("initializer_range", -1e-300, 1e6).value_or(config.initializer_range);
  config.torch_dtype = keys.text("torch_dtype").value_or(keys.text("dtype").value_or(config.torch_dtype));
  if (const Json* ours = keys.find("lightmoe")) {
    if (!ours->is_object()) keys.refuse("lightmoe", *ours, "an object");
    config.lightmoe_json = ours->dump();
  }
  config.raw_json = json;
  return config;
}

OlmoeConfig read_config(const std::filesystem::path& directory) {
  const std::filesystem::path file = directory / "config.json";
  OlmoeConfig config = parse_config(read_file(file, kConfigLimits.max_bytes), file.string());
  const std::filesystem::path generation = directory / "generation_config.json";
  if (std::filesystem::exists(generation)) {
    const Json root = parse_json(read_file(generation, kConfigLimits.max_bytes), generation.string(), kConfigLimits);
    read_token_ids(Keys(root, generation.string()), config);
  }
  return config;
}

std::string config_to_json(const OlmoeConfig& c) {
  Json root = c.raw_json.empty() ? Json::object() : parse_json(c.raw_json, "config.json as read", kConfigLimits);
  const auto put_optional = [&](const char* key, const auto& value) {
    root[key] = value ? Json(*value) : Json(nullptr);
  };
  root["architectures"] = {"OlmoeForCausalLM"};
  root["model_type"] = "olmoe";
  root["attention_bias"] = false;
  root["hidden_act"] = "silu";
  root["vocab_size"] = c.vocab_size;
  root["hidden_size"] = c.hidden_size;
  root["intermediate_size"] = c.intermediate_size;
  root["num_hidden_layers"] = c.num_layers;
  root["num_attention_heads"] = c.num_heads;
  root["num_key_value_heads"] = c.num_kv_heads;
  root["num_experts_per_tok"] = c.num_experts_per_token;
  if (root.contains("num_local_experts")) root["num_local_experts"] = c.num_experts;
  if (root.contains("num_experts") || !root.contains("num_local_experts")) root["num_experts"] = c.num_experts;
  root["max_position_embeddings"] = c.max_position_embeddings;
  root["rms_norm_eps"] = c.rms_norm_eps;
  if (root.contains("rope_parameters") && root["rope_parameters"].is_object())
    root["rope_parameters"]["rope_theta"] = c.rope_theta;
  if (root.contains("rope_theta") || !root.contains("rope_parameters")) root["rope_theta"] = c.rope_theta;
  put_optional("clip_qkv", c.clip_qkv);
  root["norm_topk_prob"] = c.norm_topk_prob;
  root["tie_word_embeddings"] = c.tie_word_embeddings;
  root["router_aux_loss_coef"] = c.router_aux_loss_coef;
  root["initializer_range"] = c.initializer_range;
  if (c.eos_token_ids.size() == 1)
    root["eos_token_id"] = c.eos_token_ids[0];
  else
    root["eos_token_id"] = c.eos_token_ids.empty() ? Json(nullptr) : Json(c.eos_token_ids);
  put_optional("pad_token_id", c.pad_token_id);
  put_optional("bos_token_id", c.bos_token_id);
  root[root.contains("dtype") ? "dtype" : "torch_dtype"] = c.torch_dtype;
  root.erase("lightmoe");
  if (!c.lightmoe_json.empty()) root["lightmoe"] = parse_json(c.lightmoe_json, "the lightmoe object", kConfigLimits);
  return root.dump(2) + "\n";
}

std::optional<OlmoeConfig> named_config(const std::string& name) {
  OlmoeConfig c;
  c.max_position_embeddings = 4096;
  c.pad_token_id = 1;
  c.eos_token_ids = {0};
  const auto shape = [&](int64_t vocab, int64_t hidden, int64_t layers, int64_t heads, int64_t experts, int64_t chosen,
                         int64_t width) {
    c.vocab_size = vocab, c.hidden_size = hidden, c.num_layers = layers, c.num_heads = c.num_kv_heads = heads;
    c.num_experts = experts, c.num_experts_per_token = chosen, c.intermediate_size = width;
  };
  if (name == "tiny") {
    shape(512, 256, 4, 4, 16, 4, 128);
  } else if (name == "mid") {
    shape(8192, 1024, 8, 8, 32, 8, 512);
  } else if (name == "olmoe-1b-7b") {  // allenai/OLMoE-1B-7B-0924
    shape(50304, 2048, 16, 16, 64, 8, 1024);
    c.eos_token_ids = {50279};
  } else {
    return {};
  }
  return c;
}

}  // namespace lightmoe
