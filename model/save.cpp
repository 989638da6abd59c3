#include "loaders/json.h"
#include "loaders/output.h"
#include "loaders/safetensors.h"
#include "model/slot_table.h"
#include "model/weights.h"

namespace lightmoe {
namespace {

// The "lightmoe" object of the model as it is now; what a method wrote about itself is kept.
std::string lightmoe_object(const Olmoe& model) {
  if (is_plain(model)) return "";
  Json method;
  if (!model.config.lightmoe_json.empty()) {
    const Json old = parse_json(model.config.lightmoe_json, "the lightmoe object");
    if (old.contains("method")) method = old["method"];
  }
  return slot_tables_to_json(shapes_of(model), method).dump();
}

}  // namespace

void save_model(const Olmoe& model, const std::filesystem::path& directory, DType dtype, int64_t max_shard_bytes) {
  for (const Block& block : model.blocks) {
    check(block.moe.annealed.empty(), ErrorKind::kUsage,
          "{}: slots still anneal (beta {}); a model can be saved when its originals are released",
          block.moe.router->name, block.moe.beta);
  }
  OlmoeConfig config = model.config;
  config.torch_dtype = dtype == DType::kBF16 ? "bfloat16" : dtype == DType::kF64 ? "float64" : "float32";
  config.lightmoe_json = lightmoe_object(model);
  write_file_atomically(directory / "config.json", config_to_json(config));

  const std::vector<StoredTensor> tensors = stored_tensors(model);
  std::vector<TensorSpec> specs;
  for (const StoredTensor& stored : tensors)
    specs.push_back({.name = stored.name, .dtype = dtype, .shape = stored.shape()});
  SafetensorsWriter writer(directory, std::move(specs), {.max_shard_bytes = max_shard_bytes, .metadata = {}});
  for (const StoredTensor& stored : tensors) writer.write(stored.name, stored.view(stored.parameter->value));
  writer.finish();
}

}  // namespace lightmoe
