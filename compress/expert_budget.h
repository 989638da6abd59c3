#pragma once
// Budgets of methods that keep whole experts: how many a layer may store.

#include "compress/registry.h"

namespace lightmoe {

// The same number in every layer (published ratios of pruning and merging are uniform), at most E.
// Error(kUsage) when fewer than `least` would stay, with the nearest possible budget. Removed slots: least = K, for a router must
// have K slots to choose from. Error(kUsage) before anything is read.
int64_t experts_per_layer(const MethodInput& input, int64_t least);
// The same for all layers together (methods that rank the experts of all layers): at least `least` times L.
int64_t experts_in_all(const MethodInput& input, int64_t least);

}  // namespace lightmoe
