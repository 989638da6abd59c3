#pragma once
// The calls of the CUDA runtime that runtime/cuda_memory.cpp makes, on host memory, for tests/cuda_memory_test.cpp. Work on the stream is
// done as late as CUDA allows: when somebody waits for it. So staging that is reused too early, or a wait that is missing, shows as wrong
// bytes. What this cannot show: whether CUDA means what is assumed here.

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <utility>
#include <vector>

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorUnknown = 999 };
using cudaStream_t = struct FakeStream*;
using cudaEvent_t = struct FakeEvent*;
using cudaGraph_t = struct FakeGraph*;
using cudaGraphExec_t = struct FakeGraph*;
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDefault };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaHostAllocDefault = 0, cudaEventDisableTiming = 2;
struct cudaPointerAttributes {
  cudaMemoryType type;
};
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount, l2CacheSize;
  size_t totalGlobalMem;
};

using FakeWork = std::vector<std::function<void()>>;
struct FakeEvent {
  size_t position = 0;  // of the stream when it was recorded
};
struct FakeGraph {
  FakeWork work;
};
struct FakeCuda {
  FakeWork queue;  // of the stream, from `done` on still to do
  size_t done = 0;
  FakeGraph* capture = nullptr;
  std::map<char*, size_t> device, locked;  // blocks
  size_t free_bytes = size_t{1} << 30;
  int mallocs = 0, frees = 0, waits = 0, graphs = 0;
  cudaError_t next_error = cudaSuccess;  // of the next call that can fail asynchronously

  static FakeCuda& get() {
    static FakeCuda state;
    return state;
  }
  void run_until(size_t position) {
    while (done < position) queue[done++]();
  }
  cudaError_t add(std::function<void()> work) {
    (capture != nullptr ? capture->work : queue).push_back(std::move(work));
    return std::exchange(next_error, cudaSuccess);
  }
  static bool holds(const std::map<char*, size_t>& blocks, const void* p) {
    auto after = blocks.upper_bound(const_cast<char*>(static_cast<const char*>(p)));
    if (after == blocks.begin()) return false;
    --after;
    return static_cast<const char*>(p) < after->first + after->second;
  }
};

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "a fake error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }  // nothing registers
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {"fake", 9, 0, 4, 1 << 20, size_t{1} << 30};
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetPCIBusId(char* bus, int, int) { return *bus = 0, cudaSuccess; }
inline cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = FakeCuda::get().free_bytes, *total = size_t{1} << 30;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  FakeCuda& fake = FakeCuda::get();
  if (fake.capture != nullptr) return cudaErrorUnknown;  // not while capturing
  ++fake.waits;
  fake.run_until(fake.queue.size());
  return std::exchange(fake.next_error, cudaSuccess);
}
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  FakeCuda& fake = FakeCuda::get();
  if (bytes > fake.free_bytes) return cudaErrorMemoryAllocation;
  fake.free_bytes -= bytes, ++fake.mallocs;
  *data = std::malloc(bytes);
  fake.device[static_cast<char*>(*data)] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) {
  FakeCuda& fake = FakeCuda::get();
  fake.run_until(fake.queue.size());
  const auto block = fake.device.find(static_cast<char*>(data));
  fake.free_bytes += block->second, ++fake.frees;
  fake.device.erase(block);
  std::free(data);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  *data = std::malloc(bytes);
  FakeCuda::get().locked[static_cast<char*>(*data)] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* data) {
  FakeCuda::get().locked.erase(static_cast<char*>(data));
  std::free(data);
  return cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  const FakeCuda& fake = FakeCuda::get();
  a->type = FakeCuda::holds(fake.device, p)   ? cudaMemoryTypeDevice
            : FakeCuda::holds(fake.locked, p) ? cudaMemoryTypeHost
                                              : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return FakeCuda::get().add([=] { std::memcpy(to, from, bytes); });
}
inline cudaError_t cudaMemsetAsync(void* data, int byte, size_t bytes, cudaStream_t) {
  return FakeCuda::get().add([=] { std::memset(data, byte, bytes); });
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new FakeEvent, cudaSuccess;  // events live as long as the process
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 0, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return event->position = FakeCuda::get().queue.size(), cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return FakeCuda::get().run_until(event->position), cudaSuccess;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return FakeCuda::get().capture = new FakeGraph, cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  FakeCuda& fake = FakeCuda::get();
  *graph = std::exchange(fake.capture, nullptr);
  ++fake.graphs;
  return std::exchange(fake.next_error, cudaSuccess);
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new FakeGraph(*graph);
  ++FakeCuda::get().graphs;
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  --FakeCuda::get().graphs;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaGraphDestroy(graph); }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  for (const auto& work : graph->work) FakeCuda::get().add(work);
  return cudaSuccess;
}
