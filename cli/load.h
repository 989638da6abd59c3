#pragma once
// Options that verbs over one model share, and what they load.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "cli/flags.h"
#include "loaders/tokenizer.h"
#include "model/olmoe.h"

namespace lightmoe::cli {

struct ModelOptions {
  std::string path;
  std::string dtype = "auto";   // of the weights in memory: auto (as stored), f32, bf16
  std::string compute = "f32";  // of the products: f32, bf16
  bool strict = false;          // tensors that the model does not use: refused instead of warned of
};
void add_model_options(Flags& app, ModelOptions& options);

struct LoadedModel {
  std::unique_ptr<Olmoe> model;
  std::unique_ptr<Tokenizer> tokenizer;  // null unless the directory has a tokenizer.json
};
LoadedModel load(const ModelOptions& options);
void warn_of_unused(const LoadReport& report, const std::string& model);  // a line on stderr, or nothing
DType parse_dtype(const std::string& name, const OlmoeConfig& config);    // auto: bf16 for 16-bit checkpoints, else f32
GemmCompute parse_compute(const std::string& name);

// Rows of `input_ids` [N,S] (i32 or i64) of a safetensors file, checked against the vocabulary of the model in `model_directory`,
// of which only config.json is read: a bad input is refused before gigabytes are loaded.
std::vector<std::vector<int32_t>> read_token_rows(const std::filesystem::path& file,
                                                  const std::filesystem::path& model_directory);
// What identifies a model directory: XXH3-128 over the names and hashes of its config, index and tensor files, 32 hex digits.
std::string model_hash(const std::filesystem::path& directory);

}  // namespace lightmoe::cli
