#pragma once
// LIGHTMOE_SIM_GUARD=1: memory of the simulated device can be touched by kernels, copies and fills only, as on a GPU. Code on the
// host that dereferences a device pointer, which a simulator in host memory would let pass, ends the process with the address and a
// backtrace. Costs two mprotect calls a launch; for tests.

namespace lightmoe::simulator {

// The memory is open while one lives; nothing when the guard is off. May be nested.
class OpenDeviceMemory {
 public:
  OpenDeviceMemory();
  ~OpenDeviceMemory();
  OpenDeviceMemory(const OpenDeviceMemory&) = delete;
  OpenDeviceMemory& operator=(const OpenDeviceMemory&) = delete;
};

}  // namespace lightmoe::simulator
