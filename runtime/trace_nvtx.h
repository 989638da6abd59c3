#pragma once
// The toolkit's half of trace.h: NVTX ranges and the switch of the profiler. Without the toolkit's headers nvtx_built() is false and the rest
// does nothing. NVTX is headers alone: it loads the tool that NVTX_INJECTION64_PATH names, and does nothing where there is none.

#include "runtime/trace.h"

namespace lightmoe {

struct NvtxRange {
  TraceLevel level;
  const char* name;  // of static duration
  int64_t payload;   // -1: none
  int layer;         // -1: none
};

bool nvtx_built();
void nvtx_push(const NvtxRange& range);
void nvtx_pop();
void profiler_start();  // cudaProfilerStart in builds with CUDA
void profiler_stop();

}  // namespace lightmoe
