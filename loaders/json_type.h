#pragma once
// The name of the JSON type alone, for headers that only pass it on: nlohmann's whole header costs a second of every compilation.

#include <nlohmann/json_fwd.hpp>

namespace lightmoe {

using Json = nlohmann::ordered_json;

}  // namespace lightmoe
