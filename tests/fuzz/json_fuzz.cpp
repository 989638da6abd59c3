// Any bytes as JSON: refused with an Error, or the same value as nlohmann's own parser makes of them.
// seeds: tests/golden/*/config.json tests/golden/*/*.index.json

#include <cstdlib>

#include "loaders/json.h"
#include "runtime/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const lightmoe::Json value =
        lightmoe::parse_json(text, "fuzz", {.max_bytes = 1 << 20, .max_depth = 16, .max_values = 10'000});
    if (value != lightmoe::Json::parse(text)) std::abort();
    lightmoe::printable(value.dump());
  } catch (const lightmoe::Error& error) {
    if (error.kind() != lightmoe::ErrorKind::kInput) std::abort();
  }
  return 0;
}
