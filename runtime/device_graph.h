#pragma once
// A list of device work recorded once and replayed with one call: a CUDA graph on cuda, a list of launches, fills and copies on sim,
// where the same code is tested. For work whose addresses and sizes never change, as a decoding step: what changes lies in device memory.
//
//   DeviceGraph graph(DeviceKind::kCuda, [&] { run(...); run(...); });   // queues nothing yet
//   graph.replay();                                                      // queues all of it; as often as wanted
//
// While the work is recorded
//   - what it allocates is the graph's for as long as the graph lives, so that replays own it; freed blocks serve later parts of the same
//     work. What it reads and writes besides must outlive the graph.
//   - bytes it copies from the host are kept with the graph: every replay copies those bytes.
//   - reading the device is an Error(kInternal): the host would wait for work that was not done.
// One graph is recorded at a time, by one thread.

#include <cstddef>
#include <functional>
#include <memory>

#include "runtime/memory.h"

namespace lightmoe {

class DeviceGraph {
 public:
  DeviceGraph(DeviceKind device, const std::function<void()>& work);
  ~DeviceGraph();
  DeviceGraph(const DeviceGraph&) = delete;
  DeviceGraph& operator=(const DeviceGraph&) = delete;
  void replay() const;
  int64_t bytes() const;  // of device memory it holds

 private:
  struct Recording;
  friend struct RecordingAccess;
  std::unique_ptr<Recording> recording_;
};

// How a device records what is queued on its stream (runtime/cuda_memory.cpp); devices without work the host knows of step by step.
struct GraphSupport {
  void (*begin)();
  void* (*end)();     // an executable graph
  void (*abandon)();  // ends a recording that failed
  void (*replay)(void* graph);
  void (*release)(void* graph);
};
void register_graph_support(DeviceKind device, const GraphSupport& support);

// For launchers of devices without GraphSupport (the simulator): notes one piece of work.
bool is_recording(DeviceKind device);
void record_step(std::function<void()> step);

namespace detail {
// For runtime/memory.cpp. While a graph of the device is recorded: a block it has free, null otherwise.
void* take_recorded(DeviceKind device, size_t bytes);
void own_recorded(DeviceKind device, void* data, size_t bytes);           // a fresh block becomes the graph's
bool keep_recorded(void* data, size_t bytes);                             // true: a graph keeps what was to be released
void release_device_memory(DeviceKind device, void* data, size_t bytes);  // in runtime/memory.cpp
// Notes the copy or fill; false: to be done now. *from may be replaced by a copy of the bytes that lives with the graph.
bool record_copy(void* to, DeviceKind to_device, const void** from, DeviceKind from_device, size_t bytes);
bool record_fill(void* data, DeviceKind device, int byte, size_t bytes);
}  // namespace detail

}  // namespace lightmoe
