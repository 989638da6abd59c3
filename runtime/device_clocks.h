#pragma once
// Clocks of a GPU while something is measured: a figure in TFLOP/s means little without them. Read through NVML, which comes with the
// driver and is loaded at run time, so that nothing links to it.

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace lightmoe {

inline constexpr const char* kNvmlLibrary = "libnvidia-ml.so.1";

struct DeviceClocks {
  int sm_mhz = 0, memory_mhz = 0;
};

// The GPU of one PCI address, as cudaDeviceGetPCIBusId writes it ("0000:1B:00.0").
class ClockReader {
 public:
  // Null where there is no such library, or it knows no such GPU.
  static std::unique_ptr<ClockReader> open(const std::string& pci_bus, const char* library = kNvmlLibrary);
  ~ClockReader();
  ClockReader(const ClockReader&) = delete;
  ClockReader& operator=(const ClockReader&) = delete;

  std::optional<DeviceClocks> read() const;

 private:
  using ClockInfo = int (*)(void* device, int clock, unsigned* mhz);
  ClockReader(void* library, void* device, ClockInfo clock_info)
      : library_(library), device_(device), clock_info_(clock_info) {}

  void *library_, *device_;
  ClockInfo clock_info_;
};

// Reads every 10 ms from construction to stop(), in a thread of its own; without a reader it does nothing.
class ClockSampler {
 public:
  explicit ClockSampler(const ClockReader* reader);
  ~ClockSampler() { stop(); }
  ClockSampler(const ClockSampler&) = delete;
  ClockSampler& operator=(const ClockSampler&) = delete;

  struct Summary {
    int sm_mhz = 0, sm_mhz_min = 0, memory_mhz = 0;  // medians, and the lowest
  };
  // Ends the thread. Empty when nothing could be read.
  std::optional<Summary> stop();

 private:
  std::vector<DeviceClocks> samples_;
  std::atomic<bool> done_ = false;
  std::thread thread_;
};

}  // namespace lightmoe
