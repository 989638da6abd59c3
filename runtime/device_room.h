#pragma once
// A run that cannot fit a device's memory is refused before it begins.

#include <cstdint>
#include <string>

namespace lightmoe {

// Throws Error(kMemory), "WHAT takes about 1.2 MiB of sim memory, 0.5 MiB are free (--max-gpu-memory 8 MiB); HINT", when the default device is
// not the CPU and has less room than `bytes`.
void require_device_room(int64_t bytes, const std::string& what, const std::string& hint);

}  // namespace lightmoe
