#include "runtime/version.h"

#ifndef LIGHTMOE_VERSION
#define LIGHTMOE_VERSION "unknown"
#endif

namespace lightmoe {
const char* version() { return LIGHTMOE_VERSION; }
}  // namespace lightmoe
