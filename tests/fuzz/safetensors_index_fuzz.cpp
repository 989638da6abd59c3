// Any bytes as model.safetensors.index.json: refused with Error(kInput), or shards that are plain file names.
// seeds: tests/golden/*/model.safetensors.index.json

#include <cstdlib>

#include "loaders/safetensors_index.h"
#include "runtime/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto index = lightmoe::parse_safetensors_index({reinterpret_cast<const char*>(data), size}, "fuzz");
    for (const std::string& shard : index.shards) {
      if (shard.empty() || shard == "." || shard == ".." ||
          shard.find_first_of(std::string("/\\\0", 3)) != std::string::npos)
        std::abort();
    }
    for (const auto& [tensor, shard] : index.weight_map) {
      if (shard >= index.shards.size()) std::abort();
    }
  } catch (const lightmoe::Error& error) {
    if (error.kind() != lightmoe::ErrorKind::kInput) std::abort();
  }
  return 0;
}
