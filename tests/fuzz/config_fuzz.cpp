// Any bytes as config.json: refused with Error(kInput), or a config whose written form reads back the same, with a slot table that
// is refused or lists its tensors.
// seeds: tests/golden/*/config.json tests/fuzz/seeds/config-*

#include <cstdlib>

#include "loaders/json.h"
#include "model/moe_extension.h"
#include "model/parameter_table.h"
#include "runtime/error.h"

namespace {

// A kind for "extension" objects: the program's own would bring its whole model along.
class Side : public lightmoe::MoeExtension {
 public:
  explicit Side(const lightmoe::Shape& shape) : weight_(std::make_shared<lightmoe::Parameter>()) {
    weight_->value = lightmoe::Tensor::borrow(nullptr, shape, lightmoe::DType::kF32);
  }
  std::vector<lightmoe::ExtensionTensor> tensors() const override { return {{.name = "weight", .parameter = weight_}}; }
  lightmoe::MoeResult run(lightmoe::Tape&, const lightmoe::MoeCall&) const override { return {}; }

 private:
  lightmoe::ParameterPtr weight_;
};
const lightmoe::RegisterExtension side{
    {.name = "side",
     .summary = "",
     .paper = "",
     .settings = {{.name = "experts", .value = 8}, {.name = "rank", .value = 4}},
     .declare = [](const lightmoe::MoeDims& dims,
                   const lightmoe::ExtensionSettings& settings) -> std::shared_ptr<lightmoe::MoeExtension> {
       return std::make_shared<Side>(lightmoe::Shape{settings.at("experts"), settings.at("rank"), dims.hidden});
     }}};

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
