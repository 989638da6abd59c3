// Memory of the simulated device under the address sanitizer: allocations of exactly the size asked for, so that one byte too far is seen.
#include "kernels/device/simulator/fiber.h"

#ifdef LIGHTMOE_ASAN

#include <cstdlib>
#include <cstring>

#include "runtime/memory.h"

namespace lightmoe::simulator {
namespace {

void* allocate(size_t bytes) {
  void* data = nullptr;
  return posix_memalign(&data, 256, bytes == 0 ? 1 : bytes) == 0 ? data : nullptr;
}

const bool registered = [] {
  register_device_memory(DeviceKind::kSim,
                         {.allocate = &allocate,
                          .release = [](void* data, size_t) { std::free(data); },
                          .copy = [](void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); },
                          .fill = [](void* data, int byte, size_t bytes) { std::memset(data, byte, bytes); }});
  return true;
}();

}  // namespace
}  // namespace lightmoe::simulator

#endif
