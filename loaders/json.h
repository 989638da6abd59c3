#pragma once
// JSON from untrusted files: parsed by nlohmann's SAX interface with caps on size, depth and element count, and duplicate keys
// refused (the DOM parser keeps the last one silently). Errors are Error(kInput) "file:line:column: reason".

#include <nlohmann/json.hpp>
#include <string>

namespace lightmoe {

struct JsonLimits {
  int64_t max_bytes = int64_t{256} << 20;
  int max_depth = 64;
  int64_t max_values = 50'000'000;
};
using Json = nlohmann::ordered_json;
// `name` (file, or file:line) starts the message of every error.
Json parse_json(const std::string& text, const std::string& name, const JsonLimits& limits = {});
Json read_json_file(const std::string& path, const JsonLimits& limits = {});

}  // namespace lightmoe
