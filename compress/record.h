#pragma once
// compression.json: how a compressed directory came to be, for people and for `recover`, which rebuilds the training set-up from
// it. Beside it the directory holds config.json, safetensors and the tokenizer's files, copied byte for byte.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "compress/plan.h"
#include "compress/registry.h"

namespace lightmoe {

// Every tensor of the input, once: what became of it.
struct Coverage {
  int64_t seen = 0;                  // in the input
  int64_t copied = 0;                // values as they were (their type may have changed)
  int64_t changed = 0;               // went into a base
  int64_t dropped = 0;               // experts that nothing stored is made of
  std::vector<std::string> skipped;  // unknown to OLMoE, not copied
  int64_t non_finite = 0;            // values, with --allow-nonfinite
};

struct CompressionRecord {
  std::string version;  // of the tool
  std::string method;
  std::string budget;  // in words
  MethodOptions options;
  int64_t rank = 0;               // of the method's adapters, 0 = none
  uint8_t factors = kAllFactors;  // of adapters, that recovery trains (AdapterFactor)
  std::string model;              // fingerprint of the original
  std::string statistics;         // hash of the file, "uniform" without one
  int64_t original_parameters = 0, stored_parameters = 0, trainable_parameters = 0;
  int64_t original_bytes = 0, stored_bytes = 0;  // of all tensors
  Coverage coverage;
  Plan plan;
};

inline constexpr const char* kRecordFile = "compression.json";
// `recovery` is what training added (null before it).
std::string record_to_json(const CompressionRecord& record, const Json& recovery);
// Reads DIR/compression.json; shapes come from DIR/config.json. Error(kInput).
CompressionRecord read_record(const std::filesystem::path& directory);

// tokenizer.json, tokenizer_config.json, generation_config.json and the like: those that are there.
void copy_side_files(const std::filesystem::path& from, const std::filesystem::path& to);

}  // namespace lightmoe
