#pragma once
// What the replacing methods share: budget -> selection -> groups -> plan. They differ in the number of bases and in the rank.

#include "compress/registry.h"

namespace lightmoe {

// bases = 0: no shared base.
Plan plan_replacement(const MethodInput& input, int64_t bases, int64_t rank);

}  // namespace lightmoe
