#pragma once
// Counters sm_MHz, sm_MHz_min and mem_MHz: medians and the lowest clock of the GPU between construction and the end of a benchmark's
// function. Nothing on other devices, or where NVML is not there.

#include <benchmark/benchmark.h>

#include "runtime/device_clocks.h"
#include "runtime/device_info.h"

namespace lightmoe::bench {

class GpuClocks {
 public:
  explicit GpuClocks(benchmark::State& state) : state_(state), sampler_(reader()) {}
  ~GpuClocks() {
    const auto clocks = sampler_.stop();
    if (!clocks) return;
    state_.counters["sm_MHz"] = clocks->sm_mhz;
    state_.counters["sm_MHz_min"] = clocks->sm_mhz_min;
    state_.counters["mem_MHz"] = clocks->memory_mhz;
  }
  GpuClocks(const GpuClocks&) = delete;
  GpuClocks& operator=(const GpuClocks&) = delete;

 private:
  static const ClockReader* reader() {
    if (default_device() != DeviceKind::kCuda) return nullptr;
    static const std::unique_ptr<ClockReader> opened = ClockReader::open(device_info(DeviceKind::kCuda).pci_bus);
    return opened.get();
  }

  benchmark::State& state_;
  ClockSampler sampler_;
};

}  // namespace lightmoe::bench
