#include <algorithm>
#include <set>

#include "loaders/json.h"
#include "loaders/safetensors.h"
#include "loaders/safetensors_header.h"
#include "model/slot_table.h"
#include "model/weights.h"

namespace lightmoe {
namespace {

constexpr size_t kShown = 5;  // names in a message

// Where the rows of a stored tensor are in the files: a tensor of its own, or one expert of a fused tensor.
struct Source {
  std::string name;
  int64_t expert = -1;     // of a fused tensor
  int64_t fused_row = 0;   // up rows come after gate rows
  int64_t fused_rows = 0;  // per expert
};

// mlp.experts.gate_up_proj [E,2F,D] and mlp.experts.down_proj [E,D,F] (transformers 5), gate rows first.
Source fused_source(int64_t layer, const Checkpoint& files, int64_t expert, ExpertMatrix matrix, const OlmoeConfig& c) {
  const bool down = matrix == ExpertMatrix::kDown;
  std::string name = fmt::format("model.layers.{}.mlp.experts.{}", layer, down ? "down_proj" : "gate_up_proj");
  if (!files.contains(name) && files.contains(name + ".weight")) name += ".weight";
  return {.name = name,
          .expert = expert,
          .fused_row = matrix == ExpertMatrix::kUp ? c.intermediate_size : 0,
          .fused_rows = down ? c.hidden_size : 2 * c.intermediate_size};
}

class Loader {
 public:
  Loader(const std::filesystem::path& directory, Olmoe& model) : files_(directory), model_(model) {
    find_fused_layers();
    for (const StoredTensor& stored : stored_tensors(model)) wanted_.push_back({stored, source_of(stored.name)});
  }

  // Everything the headers can tell, before memory is asked for.
  void check_all(LoadReport* report) const;
  void read_all() const;

 private:
  struct Wanted {
    StoredTensor stored;
    Source source;
  };
  void find_fused_layers();
  Source source_of(const std::string& name) const {
    const auto it = fused_.find(name);
    return it != fused_.end() ? it->second : Source{.name = name};
  }
  std::vector<int64_t> expected_shape(const Wanted& w) const {
    std::vector<int64_t> shape = w.stored.shape();
    if (w.source.expert >= 0) shape = {model_.config.num_experts, w.source.fused_rows, shape[1]};
    return shape;
  }

  Checkpoint files_;
  const Olmoe& model_;
  std::map<std::string, Source> fused_;  // per-expert name -> place in a fused tensor
  std::vector<Wanted> wanted_;
};

void Loader::find_fused_layers() {
  const OlmoeConfig& c = model_.config;
  for (int64_t l = 0; l < c.num_layers; ++l) {
    if (!model_.blocks[static_cast<size_t>(l)].moe.is_plain()) continue;
    if (!files_.contains(fused_source(l, files_, 0, ExpertMatrix::kGate, c).name)) continue;
    for (int64_t e = 0; e < c.num_experts; ++e) {
      for (const ExpertMatrix m : kExpertMatrices)
        fused_[expert_tensor_name(l, e, m)] = fused_source(l, files_, e, m, c);
    }
  }
}

// "3 tensors are missing: "a", "b", "c"" with the first few.
void append_names(std::string* text, const char* what, const std::vector<std::string>& names) {
  if (names.empty()) return;
  if (!text->empty()) *text += "; ";
  *text += fmt::format("{} {} {}: ", names.size(), names.size() == 1 ? "tensor" : "tensors", what);
  for (size_t i = 0; i < std::min(kShown, names.size()); ++i) *text += fmt::format("{}{}", i ? ", " : "", names[i]);
  if (names.size() > kShown) *text += ", ...";
}

void Loader::check_all(LoadReport* report) const {
  std::vector<std::string> missing, wrong, unexpected;
  std::set<std::string> seen;
  for (const Wanted& w : wanted_) {
    if (!seen.insert(w.source.name).second) continue;
    if (!files_.contains(w.source.name)) {
      missing.push_back(fmt::format("\"{}\"", w.source.name));
      continue;
    }
    const TensorInfo& info = files_.info(w.source.name);
    if (info.shape != expected_shape(w)) {
      wrong.push_back(fmt::format("\"{}\" is {}, expected {} (config.json: {})", info.name, shape_text(info.shape),
                                  shape_text(expected_shape(w)), w.stored.config_keys));
    } else if (!info.dtype() || !is_floating(*info.dtype())) {
      wrong.push_back(
          fmt::format("\"{}\" is {}, expected a floating type (F32, BF16, F16, F64)", info.name, info.file_dtype));
    }
  }
  const bool tied = model_.lm_head == model_.embedding;
  for (const std::string& name : files_.names()) {
    const bool known = name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
    if (!known && !seen.contains(name)) unexpected.push_back(name);
  }
  std::string text;
  append_names(&text, "missing", missing);
  append_names(&text, "of wrong shape or type", wrong);
  if (report == nullptr || !text.empty()) append_names(&text, "not expected", unexpected);
  check(text.empty(), ErrorKind::kInput, "{}: {}", files_.path().string(), text);
  if (report != nullptr) {
    *report = {.tensors_in_file = static_cast<int64_t>(files_.names().size()),
               .tensors_used = static_cast<int64_t>(seen.size()),
               .unexpected = unexpected};
  }
}

void Loader::read_all() const {
  for (const Wanted& w : wanted_) {
    const Tensor rows = w.stored.view(w.stored.parameter->value);
    const SafetensorsFile& file = files_.file_of(w.source.name);
    const TensorInfo& info = files_.info(w.source.name);
    if (w.source.expert < 0) {
      file.read_rows(info, 0, rows);
    } else {  // as a matrix [E * rows of an expert, columns]
      TensorInfo flat = info;
      flat.shape = {info.shape[0] * info.shape[1], info.shape[2]};
      file.read_rows(flat, w.source.expert * w.source.fused_rows + w.source.fused_row, rows);
    }
  }
}

std::vector<LayerShape> layer_shapes(const OlmoeConfig& config, const std::filesystem::path& directory) {
  if (config.lightmoe_json.empty()) {
    return std::vector<LayerShape>(static_cast<size_t>(config.num_layers), plain_layer_shape(config.num_experts));
  }
  const std::string name = (directory / "config.json").string();
  return slot_tables_from_json(parse_json(config.lightmoe_json, name), config, name);
}

}  // namespace

std::unique_ptr<Olmoe> load_model(const std::filesystem::path& directory, DType dtype, LoadReport* report) {
  const OlmoeConfig config = read_config(directory);
  std::unique_ptr<Olmoe> model = declare_model(config, layer_shapes(config, directory));
  const Loader loader(directory, *model);
  loader.check_all(report);
  allocate_weights(*model, dtype);
  loader.read_all();
  return model;
}

}  // namespace lightmoe
