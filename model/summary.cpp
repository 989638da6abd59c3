#include "model/summary.h"

#include <algorithm>
#include <numeric>
#include <unordered_map>

#include "loaders/json.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

// Of `count` latent slots that one token chose.
ActiveExperts active_latents(const LayerSummary& layer, int64_t count, int64_t hidden) {
  count = std::min(count, layer.latent_slots);
  const int64_t own = count * layer.latent_parameters;
  if (!layer.latent_mix || count == 0) {
    const int64_t met = own + std::min(count, layer.projections) * layer.projection_parameters;
    return {.parameters = met, .products = met};
  }
  const int64_t matrices = layer.latent_down ? 3 : 2;
  return {.parameters = own + layer.projections * layer.projection_parameters,
          .products = own + count * matrices * (layer.latent_size * hidden - layer.projections)};
}

}  // namespace

ActiveExperts most_active_experts(const OlmoeConfig& config, const std::vector<LayerSummary>& layers) {
  const int64_t d = config.hidden_size, f = config.intermediate_size, k = config.num_experts_per_token;
  ActiveExperts active;
  for (int64_t l = 0; l < config.num_layers; ++l) {
    int64_t experts = config.num_experts, adapters = 0, rank = 0;
    int64_t units = std::min(k, experts) * f;
    if (!layers.empty()) {
      const LayerSummary& layer = layers[static_cast<size_t>(l)];
      experts = layer.own + layer.shared, adapters = layer.adapters, rank = layer.largest_rank;
      const auto widest = std::min<std::ptrdiff_t>(k, std::ssize(layer.widths));
      units = std::accumulate(layer.widths.end() - widest, layer.widths.end(), int64_t{0});
    }
    const int64_t whole = std::min(k, experts);  // a whole expert is more than a latent one: the most there can be
    ActiveExperts latents;
    if (!layers.empty()) latents = active_latents(layers[static_cast<size_t>(l)], k - whole, d);
    const int64_t others = units * 3 * d + std::min(k, adapters) * 3 * rank * (d + f);
    active.parameters += others + latents.parameters, active.products += others + latents.products;
  }
  return active;
}

const char* layout_name(const OlmoeConfig& config, const Checkpoint& files) {
  if (!config.lightmoe_json.empty()) return "compressed";
  const std::string fused = fused_tensor_name(0, false);
  return files.contains(fused) || files.contains(fused + ".weight") ? "fused" : "per-expert";
}

void StoredCount::add(const TensorInfo& info) {
  ++tensors;
  parameters += info.numel();
  bytes += static_cast<int64_t>(info.bytes());
  dtype_bytes[info.file_dtype] += static_cast<int64_t>(info.bytes());
}

std::vector<ParameterInfo> expected_parameters(const OlmoeConfig& config, const Checkpoint& files,
                                               const std::string& name) {
  const std::string layout = layout_name(config, files);
  if (layout == "compressed") {
    return compressed_parameters(config, slot_tables_from_json(parse_json(config.lightmoe_json, name), config, name));
  }
  std::vector<ParameterInfo> list =
      stock_parameters(config, layout == "fused" ? ExpertLayout::kFused : ExpertLayout::kPerExpert);
  if (layout == "fused" && !files.contains(fused_tensor_name(0, false))) {
    for (ParameterInfo& p : list) {
      if (p.kind == ParameterKind::kExpert) p.name += ".weight";
    }
  }
  return list;
}

LayerSummary summarize_layer(const LayerShape& shape, const OlmoeConfig& config) {
  LayerSummary out;
  std::vector<int64_t> users(shape.zero_expert.size(), 0);
  for (const Slot& slot : shape.slots) {
    out.removed_slots += slot.kind == SlotKind::kRemoved ? 1 : 0;
    out.constant_slots += slot.kind == SlotKind::kConstant ? 1 : 0;
    out.latent_slots += slot.kind == SlotKind::kLatent ? 1 : 0;
    if (slot.kind != SlotKind::kExpert || slot.expert < 0) continue;
    if (shape.zero_expert[static_cast<size_t>(slot.expert)])
      ++out.zero_slots;
    else
      ++users[static_cast<size_t>(slot.expert)];
  }
  for (size_t e = 0; e < users.size(); ++e) {
    if (shape.zero_expert[e]) continue;
    out.borrowed += shape.stores(e) ? 0 : 1;
    out.widths.push_back(shape.width_of(e, config.intermediate_size));
    if (users[e] > 1)
      ++out.shared, out.sharing_slots += users[e];
    else
      ++out.own;
  }
  std::sort(out.widths.begin(), out.widths.end());
  if (shape.extension.any()) out.extension = shape.extension.text();
  out.latent_size = shape.latent_size, out.projections = shape.projections;
  out.projection_rank = shape.projection_rank;
  out.latent_down = shape.latent_down, out.latent_mix = shape.latent_mix;
  out.latent_parameters = shape.latent_parameters(config.hidden_size, config.intermediate_size);
  out.projection_parameters = shape.projection_parameters(config.hidden_size);
  out.adapters = static_cast<int64_t>(shape.adapter_rank.size());
  if (out.adapters > 0) {
    const auto [low, high] = std::minmax_element(shape.adapter_rank.begin(), shape.adapter_rank.end());
    out.smallest_rank = *low, out.largest_rank = *high;
  }
  return out;
}

ModelSummary summarize_model(const std::filesystem::path& directory) {
  ModelSummary out{.config = read_config(directory)};
  const Checkpoint files(directory);
  const std::string name = (directory / "config.json").string();
  out.layout = layout_name(out.config, files);
  if (out.layout == "compressed") {
    out.slot_tables = slot_tables_from_json(parse_json(out.config.lightmoe_json, name), out.config, name);
    for (const LayerShape& shape : out.slot_tables) out.layers.push_back(summarize_layer(shape, out.config));
  }
  std::unordered_map<std::string, ParameterKind> kinds;
  for (const ParameterInfo& p : expected_parameters(out.config, files, name)) {
    kinds.emplace(p.name, p.kind);
    out.missing += files.contains(p.name) ? 0 : 1;
  }
  for (const SafetensorsFile& file : files.files()) {
    ModelSummary::File& entry = out.files.emplace_back();
    entry.name = file.path().filename().string();
    for (const TensorInfo& info : file.tensors()) {
      const auto kind = kinds.find(info.name);
      (kind == kinds.end() ? out.other : out.kinds[static_cast<size_t>(kind->second)]).add(info);
      entry.count.add(info);
      out.total.add(info);
    }
  }
  const auto parameters = [&](ParameterKind kind) { return out.kinds[static_cast<size_t>(kind)].parameters; };
  out.active_parameters = out.total.parameters - out.other.parameters - parameters(ParameterKind::kExpert) -
                          parameters(ParameterKind::kAdapter) - parameters(ParameterKind::kConstant) -
                          parameters(ParameterKind::kLatent) + most_active_experts(out.config, out.layers).parameters;
  out.has_tokenizer = std::filesystem::exists(directory / "tokenizer.json");
  out.has_marker = std::filesystem::exists(directory / ".complete");
  return out;
}

}  // namespace lightmoe
