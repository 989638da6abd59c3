#pragma once
// Which extension a layer has (model/moe_extension.h), as data: what config.json and command lines say of it.
// On disk: "extension": {"kind": "pesc", "experts": 8, ..} in the layer's object (model/slot_table.h). As a text: "pesc" or
// "pesc:experts=4,rank=2". Settings are whole numbers.

#include <cstdint>
#include <map>
#include <string>

#include "loaders/json_type.h"
#include "model/config.h"
#include "runtime/error.h"

namespace lightmoe {

using ExtensionSettings = std::map<std::string, int64_t>;
struct ExtensionShape {
  std::string kind;  // "" = none
  ExtensionSettings settings;
  bool any() const { return !kind.empty(); }
  bool operator==(const ExtensionShape&) const = default;
  std::string text() const;  // "pesc:experts=4,rank=2"
};
// D, F, E of the layer that has it.
struct MoeDims {
  int64_t hidden = 0, width = 0, slots = 0;
};

ExtensionShape parse_extension(const std::string& text);  // defaults filled in; Error(kUsage)
// Ranges, and what the kind says of the model: Error(kind) starting with `where`.
void check_extension(const ExtensionShape& shape, const OlmoeConfig& config, ErrorKind kind, const std::string& where);
Json extension_to_json(const ExtensionShape& shape);
// Untrusted; Error(kInput) starting with `where`. Checked against the model by the caller.
ExtensionShape extension_from_json(const Json& object, const std::string& where);

int64_t extension_parameters(const ExtensionShape& shape, const MoeDims& dims);

}  // namespace lightmoe
