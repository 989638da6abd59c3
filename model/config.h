#pragma once
// config.json of an OlmoeForCausalLM directory (Hugging Face configuration_olmoe.py), every switch honoured.
// Every value is read from the file: the class default of intermediate_size (2048) is not what OLMoE-1B-7B uses (1024).

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace lightmoe {

struct OlmoeConfig {
  int64_t vocab_size = 0;             // V, embedding rows (may exceed the tokenizer's size)
  int64_t hidden_size = 0;            // D
  int64_t intermediate_size = 0;      // F, width of one expert
  int64_t num_layers = 0;             // L, num_hidden_layers
  int64_t num_heads = 0;              // H, num_attention_heads
  int64_t num_kv_heads = 0;           // Hkv; null or absent means num_heads
  int64_t num_experts = 0;            // E, num_experts or num_local_experts
  int64_t num_experts_per_token = 0;  // K
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-5;
  double rope_theta =
      10000;  // rope_theta or rope_parameters.rope_theta; rope_scaling other than null/default is refused
  std::optional<double> clip_qkv;
  bool norm_topk_prob = false;
  bool tie_word_embeddings = false;
  double router_aux_loss_coef = 0.01;
  double initializer_range = 0.02;
  std::vector<int64_t> eos_token_ids;  // eos_token_id: int or list; generation_config.json overrides
  std::optional<int64_t> pad_token_id, bos_token_id;
  std::string torch_dtype = "float32";  // torch_dtype or dtype
  std::string raw_json;                 // the file as read: keys we do not use are kept when writing
  std::string lightmoe_json;            // the "lightmoe" object of a compressed checkpoint, "" in a stock one

  int64_t head_dim() const { return hidden_size / num_heads; }
};

// Reads DIR/config.json (and generation_config.json if there). Refuses, with key, value and legal range: another
// architecture, missing keys, wrong types, duplicate keys, top_k > experts, heads not dividing hidden, sizes past the caps,
// attention_bias true, hidden_act other than silu. Throws Error(kInput).
OlmoeConfig read_config(const std::filesystem::path& directory);
OlmoeConfig parse_config(const std::string& json, const std::string& name_for_messages);
// config.json text for a model of this shape; keys of raw_json that we do not own are kept, `lightmoe_json` is embedded if set.
std::string config_to_json(const OlmoeConfig& config);

// "tiny", "mid", "olmoe-1b-7b": the shapes that bench and `random` know.
std::optional<OlmoeConfig> named_config(const std::string& name);

}  // namespace lightmoe
