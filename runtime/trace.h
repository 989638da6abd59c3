#pragma once
// Named ranges: step / phase / layer / op ("L07.moe.gate_up"), with an optional payload (tokens or bytes). Off by default and then one
// branch. They go to
//   a timeline    collected, then written as Chrome-trace JSON (chrome://tracing, Perfetto);
//   NVTX          the domain "lightmoe", registered strings, levels as categories, in builds that found the toolkit's headers. Nsight shows it.
// profile_steps limits both to some steps and, in builds with CUDA, encloses those in cudaProfilerStart and cudaProfilerStop
// (nsys --capture-range=cudaProfilerApi, ncu --profile-from-start off).

#include <atomic>
#include <cstdint>
#include <string>

namespace lightmoe {

enum class TraceLevel : uint8_t { kStep, kPhase, kLayer, kOp };
const char* name_of(TraceLevel level);

namespace detail {
inline std::atomic<bool> trace_on{false};
}
inline bool trace_enabled() { return detail::trace_on.load(std::memory_order_relaxed); }

void trace_start();
// Writes {"traceEvents": [...]} with microsecond times; throws Error(kIo). Stops collecting.
void trace_write(const std::string& path);

bool nvtx_available();  // was NVTX there when this was built?
void nvtx_start();      // Error(kDevice) where it was not

// Steps first..last alone are traced and profiled: training steps as the log numbers them; batches of calibration from 0; passes of
// generation from 0, which is the prefill.
void profile_steps(int64_t first, int64_t last);
// "A:B" or "A"; Error(kUsage).
void profile_steps(const std::string& range);
// To be called as each step begins, and with -1 when the last has ended.
void profile_step(int64_t step);

class TraceRange {
 public:
  TraceRange(TraceLevel level, const char* name, int64_t payload = -1, int layer = -1) {
    if (trace_enabled()) begin(level, name, payload, layer);
  }
  ~TraceRange() {
    if (active_) end();
  }
  TraceRange(const TraceRange&) = delete;
  TraceRange& operator=(const TraceRange&) = delete;

 private:
  void begin(TraceLevel level, const char* name, int64_t payload, int layer);
  void end();
  bool active_ = false, pushed_ = false;
  int64_t index_ = -1;  // of the timeline's event
};

}  // namespace lightmoe
