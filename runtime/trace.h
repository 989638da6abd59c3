#pragma once
// Named ranges: step / phase / layer / op ("L07.moe.gate_up"), with an optional payload (tokens or
// bytes). Off by default and then one branch. When a timeline is on, ranges are collected and can
// be written as Chrome-trace JSON (chrome://tracing, Perfetto). The CUDA build adds NVTX here.

#include <cstdint>
#include <string>

namespace lightmoe {

enum class TraceLevel : uint8_t { kStep, kPhase, kLayer, kOp };

bool trace_enabled();
void trace_start();
// Writes {"traceEvents": [...]} with microsecond times; throws Error(kIo). Stops collecting.
void trace_write(const std::string& path);

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
  bool active_ = false;
  size_t index_ = 0;
};

}  // namespace lightmoe
