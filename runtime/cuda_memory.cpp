// Memory and queue of the GPU, in builds with CUDA (make CUDA=1); nothing otherwise. Registers only where a GPU answers.
#ifdef LIGHTMOE_CUDA

#include <cuda_runtime.h>

#include <cstring>
#include <utility>

#include "runtime/device.h"
#include "runtime/device_graph.h"
#include "runtime/device_info.h"
#include "runtime/device_pool.h"
#include "runtime/device_timer.h"
#include "runtime/error.h"
#include "runtime/memory.h"

namespace lightmoe {
namespace {

void check_cuda(cudaError_t error, const char* what, size_t bytes = 0) {
  check(error == cudaSuccess, ErrorKind::kDevice, "cuda: {} of {} bytes: {}", what, bytes, cudaGetErrorString(error));
}

// Everything is queued here; it does not wait for the default stream nor does that wait for it.
cudaStream_t stream() {
  static const cudaStream_t created = [] {
    cudaStream_t s = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "a stream");
    return s;
  }();
  return created;
}
void* stream_handle() { return stream(); }
void wait() { check_cuda(cudaStreamSynchronize(stream()), "work queued before"); }

void* allocate_from_device(size_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // an allocation that does not fit leaves the device usable
    return nullptr;
  }
  check_cuda(error, "allocation", bytes);
  return data;
}
void release_to_device(void* data, size_t) { cudaFree(data); }  // waits for the device first

DevicePool& pool() {
  static DevicePool* made = new DevicePool({&allocate_from_device, &release_to_device});  // outlives static tensors
  return *made;
}
void* allocate(size_t bytes) { return pool().allocate(bytes); }
void release(void* data, size_t bytes) { pool().release(data, bytes); }

bool recording = false;  // between begin_graph and end_graph nothing may be waited for

// Small copies from the host leave from page-locked memory, so that the host goes on at once: what they copy from may be reused. Two
// halves; one is filled while the copies out of the other are on their way.
class SmallUploads {
 public:
  static constexpr size_t kLargest = size_t{1} << 20;
  void push(void* to, const void* from, size_t bytes) {
    if (data_ == nullptr) make();
    if (at_ + bytes > kHalf) turn();
    char* place = data_ + half_ * kHalf + at_;
    std::memcpy(place, from, bytes);
    check_cuda(cudaMemcpyAsync(to, place, bytes, cudaMemcpyHostToDevice, stream()), "copy", bytes);
    at_ += (bytes + 255) / 256 * 256;
  }

 private:
  static constexpr size_t kHalf = size_t{4} << 20;
  void make() {
    check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&data_), 2 * kHalf, cudaHostAllocDefault), "staging", 2 * kHalf);
    for (cudaEvent_t& event : sent_) check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event");
  }
  void turn() {
    check_cuda(cudaEventRecord(sent_[half_], stream()), "copy");
    half_ ^= 1, at_ = 0;
    check_cuda(cudaEventSynchronize(sent_[half_]), "copy");  // at once where nothing was ever recorded
  }
  char* data_ = nullptr;
  size_t at_ = 0;
  int half_ = 0;
  cudaEvent_t sent_[2] = {};
};

bool is_device_memory(const void* p) {
  cudaPointerAttributes attributes{};
  return cudaPointerGetAttributes(&attributes, p) == cudaSuccess && attributes.type == cudaMemoryTypeDevice;
}

void copy(void* to, const void* from, size_t bytes) {
  static SmallUploads* const small = new SmallUploads;
  const bool to_host = !is_device_memory(to), from_host = !is_device_memory(from);
  if (from_host && !to_host && !recording && bytes <= SmallUploads::kLargest) return small->push(to, from, bytes);
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()), "copy", bytes);
  if ((to_host || from_host) && !recording) check_cuda(cudaStreamSynchronize(stream()), "copy", bytes);
}
void fill(void* data, int byte, size_t bytes) {
  check_cuda(cudaMemsetAsync(data, byte, bytes, stream()), "fill", bytes);
}

void* allocate_staging(size_t bytes) {
  void* data = nullptr;
  return cudaHostAlloc(&data, bytes, cudaHostAllocDefault) == cudaSuccess ? data : nullptr;
}
void release_staging(void* data) { cudaFreeHost(data); }
cudaEvent_t sent(int slot) {
  static cudaEvent_t events[2] = {};
  if (events[slot] == nullptr) check_cuda(cudaEventCreateWithFlags(&events[slot], cudaEventDisableTiming), "an event");
  return events[slot];
}
void upload_piece(void* to, const void* from, size_t bytes, int slot) {
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream()), "upload", bytes);
  check_cuda(cudaEventRecord(sent(slot), stream()), "upload", bytes);
}
void wait_upload(int slot) { check_cuda(cudaEventSynchronize(sent(slot)), "upload"); }

int64_t free_bytes() {
  size_t available = 0, total = 0;
  check_cuda(cudaMemGetInfo(&available, &total), "free memory");
  return static_cast<int64_t>(available) + pool().use().kept_bytes;
}
void set_limit(int64_t bytes) { pool().set_limit(bytes); }

cudaEvent_t timer_event(int which) {
  static cudaEvent_t events[2] = {};
  if (events[which] == nullptr) check_cuda(cudaEventCreate(&events[which]), "an event");
  return events[which];
}
void record_event(int which) { check_cuda(cudaEventRecord(timer_event(which), stream()), "an event"); }
double elapsed_us() {
  float milliseconds = 0;
  check_cuda(cudaEventSynchronize(timer_event(1)), "work that is timed");
  check_cuda(cudaEventElapsedTime(&milliseconds, timer_event(0), timer_event(1)), "work that is timed");
  return 1e3 * static_cast<double>(milliseconds);
}

// CUDA graphs. Relaxed: what is recorded may ask the pool, and the pool the device, for memory.
void begin_graph() {
  check_cuda(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeRelaxed), "recording");
  recording = true;
}
cudaGraph_t end_capture() {
  cudaGraph_t graph = nullptr;
  recording = false;
  check_cuda(cudaStreamEndCapture(stream(), &graph), "recording");
  return graph;
}
void* end_graph() {
  const cudaGraph_t graph = end_capture();
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check_cuda(error, "instantiation of a graph");
  return executable;
}
void abandon_graph() {
  cudaGraph_t graph = nullptr;
  if (std::exchange(recording, false)) cudaStreamEndCapture(stream(), &graph);
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaGetLastError();  // a recording that failed leaves the stream usable
}
void replay_graph(void* graph) {
  check_cuda(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), stream()), "replay of a graph");
}
void release_graph(void* graph) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)); }

DeviceInfo info() {
  int device = 0, driver = 0, runtime = 0;
  check_cuda(cudaGetDevice(&device), "query of the current device");
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, device), "query of the device's properties");
  char pci_bus[32] = {};
  check_cuda(cudaDeviceGetPCIBusId(pci_bus, sizeof pci_bus, device), "query of the device's PCI address");
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const auto version = [](int number) { return fmt::format("{}.{}", number / 1000, number % 1000 / 10); };
  return {.name = properties.name,
          .compute_capability = 10 * properties.major + properties.minor,
          .multiprocessors = properties.multiProcessorCount,
          .memory_bytes = static_cast<int64_t>(properties.totalGlobalMem),
          .l2_bytes = properties.l2CacheSize,
          .driver = version(driver),
          .runtime = version(runtime),
          .pci_bus = pci_bus};
}

const bool registered = [] {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return false;
  register_device_memory(DeviceKind::kCuda, {&allocate, &release, &copy, &fill});
  register_device_queue(DeviceKind::kCuda, {.stream = &stream_handle,
                                            .wait = &wait,
                                            .allocate_staging = &allocate_staging,
                                            .release_staging = &release_staging,
                                            .upload = &upload_piece,
                                            .wait_upload = &wait_upload,
                                            .free_bytes = &free_bytes,
                                            .set_limit = &set_limit});
  register_device_events(DeviceKind::kCuda, {&record_event, &elapsed_us});
  register_graph_support(DeviceKind::kCuda, {.begin = &begin_graph,
                                             .end = &end_graph,
                                             .abandon = &abandon_graph,
                                             .replay = &replay_graph,
                                             .release = &release_graph});
  register_device_info(DeviceKind::kCuda, &info);
  return true;
}();

}  // namespace
}  // namespace lightmoe

#endif
