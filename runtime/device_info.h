#pragma once
// What a device is, read from it and never assumed: for messages, benchmarks and the validators of the GEMM tuning file.

#include <cstdint>
#include <string>

#include "runtime/memory.h"

namespace lightmoe {

struct DeviceInfo {
  std::string name;                        // "AMD EPYC 9B14", "NVIDIA H200"
  int compute_capability = 0;              // 90 for sm_90; 0 for cpu and sim
  int multiprocessors = 0;                 // of a GPU; elsewhere hardware threads in use
  int64_t memory_bytes = 0, l2_bytes = 0;  // 0: unknown
  std::string driver, runtime;             // versions, "13.0"; empty for cpu and sim
  std::string pci_bus;                     // "0000:1B:00.0"; empty for cpu and sim
};
// Error(kDevice) when the device is not there.
DeviceInfo device_info(DeviceKind device);

// Of the GPU, in builds with CUDA (runtime/cuda_memory.cpp registers it where one answers).
void register_device_info(DeviceKind device, DeviceInfo (*read)());

}  // namespace lightmoe
