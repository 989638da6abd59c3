// Any bytes as config.json: refused with Error(kInput), or a config whose written form reads back the same, with a slot table that
// is refused or lists its tensors.
// seeds: tests/golden/*/config.json tests/fuzz/seeds/config-*

#include <cstdlib>

#include "loaders/json.h"
#include "model/parameter_table.h"
#include "runtime/error.h"

namespace {

void require_same(bool same) {
  if (!same) std::abort();
}

void check_config(const lightmoe::OlmoeConfig& c) {
  const std::string text = lightmoe::config_to_json(c);
  const lightmoe::OlmoeConfig again = lightmoe::parse_config(text, "again");
  require_same(lightmoe::config_to_json(again) == text);
  require_same(c.hidden_size == again.hidden_size && c.num_experts == again.num_experts &&
               c.rope_theta == again.rope_theta);
  require_same(c.eos_token_ids == again.eos_token_ids && c.clip_qkv == again.clip_qkv);
  require_same(c.num_experts_per_token <= c.num_experts && c.head_dim() * c.num_heads == c.hidden_size);
  if (c.lightmoe_json.empty() || c.num_layers * c.num_experts > 10'000) return;
  const auto layers = lightmoe::slot_tables_from_json(lightmoe::parse_json(c.lightmoe_json, "fuzz"), c, "fuzz");
  for (const auto& p : lightmoe::compressed_parameters(c, layers)) require_same(p.numel() >= 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    check_config(lightmoe::parse_config(std::string(reinterpret_cast<const char*>(data), size), "fuzz"));
  } catch (const lightmoe::Error& error) {
    if (error.kind() != lightmoe::ErrorKind::kInput) std::abort();
  }
  return 0;
}
