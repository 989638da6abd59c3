#pragma once
// JSON from untrusted files: parsed by nlohmann's SAX interface with caps on size, depth and element count, and duplicate keys
// refused (the DOM parser keeps the last one silently). Errors are Error(kInput) "file:line:column: reason".
// NOTE: find() on a Json object is a linear search; walk over large objects instead.

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "loaders/json_type.h"

// Instantiated in json.cpp alone: a second less of every compilation.
extern template class nlohmann::basic_json<nlohmann::ordered_map>;
extern template class nlohmann::detail::serializer<nlohmann::ordered_json>;

namespace lightmoe {

struct JsonLimits {
  int64_t max_bytes = int64_t{256} << 20;
  int max_depth = 64;
  int64_t max_values = 50'000'000;
};
// `name` (file, or file:line) starts the message of every error.
Json parse_json(std::string_view text, const std::string& name, const JsonLimits& limits = {});
Json read_json_file(const std::string& path, const JsonLimits& limits = {});

}  // namespace lightmoe
