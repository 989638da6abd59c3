#pragma once
// Extensions (model/moe_extension.h) of a whole model in memory.

#include "model/moe_extension.h"
#include "model/olmoe.h"

namespace lightmoe {

// Error(kUsage) when a layer has an extension already, or has slots that the kind cannot serve, or a setting is out of range.
void check_extendable(const Olmoe& model, const ExtensionShape& shape);
// Gives every layer the extension, in new memory (f32, or f64 with f64 weights), started from the seed, under its own names.
void extend_model(Olmoe& model, const ExtensionShape& shape, uint64_t seed);
// The extension's parameters train, all else is frozen. Works on declared parameters as well.
void train_extension_alone(const Olmoe& model);
// Of a layer, by its name within the extension; null when it has none of that name.
ParameterPtr extension_parameter(const MoeLayer& layer, const std::string& name);

}  // namespace lightmoe
