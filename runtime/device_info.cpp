#include "runtime/device_info.h"

#include <unistd.h>

#include <fstream>

#include "runtime/error.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

DeviceInfo (*readers[kNumDeviceKinds])() = {};

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown processor";
}

}  // namespace

void register_device_info(DeviceKind device, DeviceInfo (*read)()) { readers[static_cast<int>(device)] = read; }

DeviceInfo device_info(DeviceKind device) {
  if (const auto read = readers[static_cast<int>(device)]) return read();
  check(device != DeviceKind::kCuda, ErrorKind::kDevice, "cuda: no GPU in this machine, or none in this build");
  DeviceInfo info;
  info.name = device == DeviceKind::kSim ? "simulator on " + processor_name() : processor_name();
  info.multiprocessors = num_threads();
  info.memory_bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
  return info;
}

}  // namespace lightmoe
