#include "cli/load.h"

#include <xxhash.h>

#include <algorithm>

#include "loaders/dataset.h"
#include "loaders/output.h"
#include "runtime/error.h"

namespace lightmoe::cli {

void add_model_options(Flags& app, ModelOptions& options) {
  app.add_option("model", options.path, "model directory (Hugging Face OLMoE, or compressed)")->required();
  app.add_option("--dtype", options.dtype, "weights in memory: auto (as stored), f32, bf16")->capture_default_str();
  app.add_option("--compute", options.compute, "products: f32, or bf16 with f32 sums")->capture_default_str();
  app.add_flag("--strict", options.strict, "refuse a model with tensors it does not use, instead of warning");
}

DType parse_dtype(const std::string& name, const OlmoeConfig& config) {
  if (name == "f32") return DType::kF32;
  if (name == "bf16") return DType::kBF16;
  check(name == "auto", ErrorKind::kUsage, "--dtype {}: expected auto, f32 or bf16", name);
  return config.torch_dtype == "bfloat16" || config.torch_dtype == "float16" ? DType::kBF16 : DType::kF32;
}

GemmCompute parse_compute(const std::string& name) {
  check(name == "f32" || name == "bf16", ErrorKind::kUsage, "--compute {}: expected f32 or bf16", name);
  return name == "f32" ? GemmCompute::kF32 : GemmCompute::kBF16;
}

void warn_of_unused(const LoadReport& report, const std::string& model) {
  if (report.unexpected.empty()) return;
  fmt::print(stderr, "warning: {}: {} tensors not used, the first is {}\n", model, report.unexpected.size(),
             report.unexpected[0]);
}

LoadedModel load(const ModelOptions& options) {
  const std::filesystem::path directory = options.path;
  LoadedModel loaded;
  const OlmoeConfig config = read_config(directory);
  const DType dtype = parse_dtype(options.dtype, config);
  if (std::filesystem::exists(directory / "tokenizer.json")) {
    loaded.tokenizer = std::make_unique<Tokenizer>(Tokenizer::load(directory));
    check(loaded.tokenizer->vocab_size() <= config.vocab_size, ErrorKind::kInput,
          "{}: has ids up to {}, but vocab_size in config.json is {}; is this another model's tokenizer?",
          (directory / "tokenizer.json").string(), loaded.tokenizer->vocab_size() - 1, config.vocab_size);
  }
  LoadReport report;
  loaded.model = load_model(directory, dtype, options.strict ? nullptr : &report);
  warn_of_unused(report, options.path);
  return loaded;
}

std::vector<std::vector<int32_t>> read_token_rows(const std::filesystem::path& file,
                                                  const std::filesystem::path& model_directory) {
  std::vector<std::vector<int32_t>> rows;
  for (Document& document : documents_from_tokens(file, read_config(model_directory).vocab_size))
    rows.push_back(std::move(document.ids));
  check(!rows.empty(), ErrorKind::kInput, "{}: input_ids has no rows", file.string());
  return rows;
}

std::string model_hash(const std::filesystem::path& directory) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (name == "config.json" || name == "model.safetensors.index.json" || entry.path().extension() == ".safetensors")
      names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  std::string all;
  for (const std::string& name : names) all += name + " " + hash_file(directory / name) + "\n";
  const XXH128_hash_t hash = XXH3_128bits(all.data(), all.size());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

}  // namespace lightmoe::cli
