#pragma once
// The header of a safetensors file: text to a checked list of tensors. Apart from the reader so that it can be fuzzed alone.

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "loaders/safetensors.h"

namespace lightmoe {

inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // as the reference implementation

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // by offset
  std::map<std::string, std::string> metadata;
};
// `text` is the JSON; data_begin = 8 + its length. Every rule of the format that does not need the data. Error(kInput).
SafetensorsHeader parse_safetensors_header(std::string_view text, uint64_t file_bytes, const std::string& name);

// Bits of one element of a dtype as written in files, 0 when unknown.
int64_t bits_of_file_dtype(std::string_view file_dtype);
std::string_view file_dtype_of(DType dtype);
std::string shape_text(const std::vector<int64_t>& shape);

}  // namespace lightmoe
