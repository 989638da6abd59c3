#include "runtime/trace_nvtx.h"

#ifdef LIGHTMOE_NVTX
#include <nvtx3/nvToolsExt.h>

#include <map>
#include <string>
#include <utility>

#include "runtime/error.h"
#endif
#ifdef LIGHTMOE_CUDA
#include <cuda_profiler_api.h>
#include <cuda_runtime.h>
#endif

namespace lightmoe {

#ifdef LIGHTMOE_NVTX
namespace {

nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t created = [] {
    const nvtxDomainHandle_t handle = nvtxDomainCreateA("lightmoe");
    for (const TraceLevel level : {TraceLevel::kStep, TraceLevel::kPhase, TraceLevel::kLayer, TraceLevel::kOp}) {
      nvtxDomainNameCategoryA(handle, 1 + static_cast<uint32_t>(level), name_of(level));
    }
    return handle;
  }();
  return created;
}

// A name is handed to the tool once.
nvtxStringHandle_t registered(const char* name, int layer) {
  static std::map<std::pair<const char*, int>, nvtxStringHandle_t> known;
  const auto [place, is_new] = known.try_emplace({name, layer}, nullptr);
  if (is_new) {
    const std::string text = layer >= 0 ? fmt::format("L{:02}.{}", layer, name) : name;
    place->second = nvtxDomainRegisterStringA(domain(), text.c_str());
  }
  return place->second;
}

}  // namespace

bool nvtx_built() { return true; }

void nvtx_push(const NvtxRange& range) {
  nvtxEventAttributes_t event{};
  event.version = NVTX_VERSION;
  event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  event.category = 1 + static_cast<uint32_t>(range.level);
  event.messageType = NVTX_MESSAGE_TYPE_REGISTERED;
  event.message.registered = registered(range.name, range.layer);
  if (range.payload >= 0) {
    event.payloadType = NVTX_PAYLOAD_TYPE_INT64;
    event.payload.llValue = range.payload;
  }
  nvtxDomainRangePushEx(domain(), &event);
}
void nvtx_pop() { nvtxDomainRangePop(domain()); }
#else
bool nvtx_built() { return false; }
void nvtx_push(const NvtxRange&) {}
void nvtx_pop() {}
#endif

#ifdef LIGHTMOE_CUDA
void profiler_start() { cudaProfilerStart(); }
void profiler_stop() {
  cudaDeviceSynchronize();  // the last step's kernels belong to it
  cudaProfilerStop();
}
#else
void profiler_start() {}
void profiler_stop() {}
#endif

}  // namespace lightmoe
