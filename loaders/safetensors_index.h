#pragma once
// model.safetensors.index.json: {"metadata":{"total_size":bytes}, "weight_map":{tensor: shard}}. Apart so that it can be fuzzed.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lightmoe {

struct SafetensorsIndex {
  std::vector<std::pair<std::string, size_t>> weight_map;  // tensor -> number of its shard below
  std::vector<std::string> shards;                         // plain file names, each once
  std::optional<uint64_t> total_size;
};
// Error(kInput); a shard name that is anything but a plain file name is refused before anything is opened.
SafetensorsIndex parse_safetensors_index(std::string_view text, const std::string& name);

}  // namespace lightmoe
