#pragma once
// What a model directory holds, from its config and the headers of its files; no tensor data are read.

#include <array>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "loaders/safetensors.h"
#include "model/parameter_table.h"

namespace lightmoe {

// "compressed", "fused" or "per-expert": how these files hold the experts.
const char* layout_name(const OlmoeConfig& config, const Checkpoint& files);
// The tensors that the config asks for, in the layout these files have them: per-expert, fused (with or without .weight), or
// compressed. Error(kInput) when the slot table is wrong.
std::vector<ParameterInfo> expected_parameters(const OlmoeConfig& config, const Checkpoint& files,
                                               const std::string& name);

struct StoredCount {
  int64_t tensors = 0, parameters = 0, bytes = 0;
  std::map<std::string, int64_t> dtype_bytes;  // by dtype as written in the file
  void add(const TensorInfo& info);
};

struct LayerSummary {    // of a compressed layer
  int64_t own = 0;       // stored experts that one slot of the layer uses
  int64_t shared = 0;    // stored experts that several slots use
  int64_t borrowed = 0;  // of both, experts that another layer stores
  int64_t sharing_slots = 0, zero_slots = 0, removed_slots = 0, constant_slots = 0, latent_slots = 0;
  int64_t latent_size = 0, projections = 0, projection_rank = 0;
  bool latent_down = false, latent_mix = false;
  int64_t latent_parameters = 0, projection_parameters = 0;  // of one latent, of one projection
  int64_t adapters = 0, smallest_rank = 0, largest_rank = 0;
  std::string extension;        // as a text, "" without one
  std::vector<int64_t> widths;  // units of the stored experts (borrowed ones too), ascending
};

struct ModelSummary {
  OlmoeConfig config;
  std::string layout;  // "per-expert", "fused", "compressed"
  std::array<StoredCount, kNumParameterKinds> kinds;
  StoredCount other, total;       // other: tensors the config knows nothing of
  int64_t missing = 0;            // tensors the config asks for that are not there
  int64_t active_parameters = 0;  // that one token meets at most: all but the experts and adapters it is not routed to
  struct File {
    std::string name;
    StoredCount count;
  };
  std::vector<File> files;
  std::vector<LayerShape> slot_tables;  // of a compressed model
  std::vector<LayerSummary> layers;
  bool has_tokenizer = false, has_marker = false;
};
ModelSummary summarize_model(const std::filesystem::path& directory);
LayerSummary summarize_layer(const LayerShape& shape, const OlmoeConfig& config);
// Of the experts and adapters of all layers, what one token meets when its K slots share as little as they can; no layers: the stock
// shape. products: weights that its rows are multiplied with, which differ where projections are mixed: a token meets all bases and
// multiplies with its latents' mixes.
struct ActiveExperts {
  int64_t parameters = 0, products = 0;
};
ActiveExperts most_active_experts(const OlmoeConfig& config, const std::vector<LayerSummary>& layers);

}  // namespace lightmoe
