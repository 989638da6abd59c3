#pragma once
// Time of work on a device: on a GPU between two events on its stream, so that what the host does meanwhile is not in it; elsewhere by the
// clock, once the work is done.

#include <chrono>

#include "runtime/memory.h"

namespace lightmoe {

class DeviceTimer {
 public:
  explicit DeviceTimer(DeviceKind device) : device_(device) {}
  void start();
  double stop_us();  // waits for the work between

 private:
  DeviceKind device_;
  std::chrono::steady_clock::time_point begin_;
};

// Events 0 and 1 of a device (runtime/cuda_memory.cpp registers those of the GPU).
struct DeviceEvents {
  void (*record)(int event);
  double (*elapsed_us)();  // between 0 and 1; waits
};
void register_device_events(DeviceKind device, const DeviceEvents& events);

}  // namespace lightmoe
