#include "runtime/device_clocks.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>

namespace lightmoe {
namespace {

// Of NVML's interface, which keeps these names and numbers: nvmlReturn_t and nvmlClockType_t.
constexpr int kSuccess = 0, kSmClock = 1, kMemoryClock = 2;

template <class Function>
Function symbol(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

std::unique_ptr<ClockReader> ClockReader::open(const std::string& pci_bus, const char* name) {
  void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return nullptr;
  const auto init = symbol<int (*)()>(library, "nvmlInit_v2");
  const auto by_bus = symbol<int (*)(const char*, void**)>(library, "nvmlDeviceGetHandleByPciBusId_v2");
  const auto clock_info = symbol<ClockInfo>(library, "nvmlDeviceGetClockInfo");
  void* device = nullptr;
  if (init != nullptr && by_bus != nullptr && clock_info != nullptr && init() == kSuccess &&
      by_bus(pci_bus.c_str(), &device) == kSuccess) {
    return std::unique_ptr<ClockReader>(new ClockReader(library, device, clock_info));
  }
  dlclose(library);
  return nullptr;
}

ClockReader::~ClockReader() {
  if (const auto shutdown = symbol<int (*)()>(library_, "nvmlShutdown")) shutdown();
  dlclose(library_);
}

std::optional<DeviceClocks> ClockReader::read() const {
  unsigned sm = 0, memory = 0;
  if (clock_info_(device_, kSmClock, &sm) != kSuccess || clock_info_(device_, kMemoryClock, &memory) != kSuccess) {
    return std::nullopt;
  }
  return DeviceClocks{static_cast<int>(sm), static_cast<int>(memory)};
}

ClockSampler::ClockSampler(const ClockReader* reader) {
  if (reader == nullptr) return;
  thread_ = std::thread([this, reader] {
    do {
      if (const auto clocks = reader->read()) samples_.push_back(*clocks);
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    } while (!done_);
  });
}

std::optional<ClockSampler::Summary> ClockSampler::stop() {
  done_ = true;
  if (thread_.joinable()) thread_.join();
  if (samples_.empty()) return std::nullopt;
  const auto middle = [this](int DeviceClocks::*clock) {
    std::ranges::sort(samples_, {}, clock);
    return samples_[samples_.size() / 2].*clock;
  };
  Summary summary{.memory_mhz = middle(&DeviceClocks::memory_mhz)};
  summary.sm_mhz = middle(&DeviceClocks::sm_mhz);
  summary.sm_mhz_min = samples_.front().sm_mhz;
  return summary;
}

}  // namespace lightmoe
