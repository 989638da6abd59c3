#pragma once
// Flags that give a model an extension (model/moe_extension.h) before it trains.

#include <string>

#include "cli/flags.h"
#include "model/olmoe.h"

namespace lightmoe::cli {

struct ExtensionFlags {
  std::string extend;    // "pesc:experts=4", "" = none
  std::string clusters;  // statistics file
};
void add_extension_flags(Flags& app, ExtensionFlags& flags);
void extend(Olmoe& model, const ExtensionFlags& flags, uint64_t seed);

}  // namespace lightmoe::cli
