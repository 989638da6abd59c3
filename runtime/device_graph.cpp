#include "runtime/device_graph.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "runtime/error.h"

namespace lightmoe {

struct DeviceGraph::Recording {
  DeviceKind device = DeviceKind::kCpu;
  std::vector<std::function<void()>> steps;  // devices without GraphSupport
  void* graph = nullptr;                     // those with it
  std::vector<std::unique_ptr<char[]>> host_bytes;
  std::map<size_t, std::vector<void*>> free;  // by size
  std::unordered_map<void*, size_t> owned;
};
struct RecordingAccess {
  using Recording = DeviceGraph::Recording;
};

namespace {

using Recording = RecordingAccess::Recording;

std::atomic<Recording*> recorded{nullptr};
// Blocks of all graphs that live, by address: a tensor made while recording may be released at any time after.
std::mutex mutex;
std::unordered_map<void*, Recording*>& owners() {
  static auto* map = new std::unordered_map<void*, Recording*>;  // outlives static tensors
  return *map;
}
std::atomic<int64_t> num_owned{0};

std::array<GraphSupport, kNumDeviceKinds>& supports() {
  static std::array<GraphSupport, kNumDeviceKinds> table = {};  // filled by static objects of other files
  return table;
}
const GraphSupport& support_of(DeviceKind device) { return supports()[static_cast<size_t>(device)]; }

Recording* recording_on(DeviceKind device) {
  Recording* now = recorded.load(std::memory_order_relaxed);
  return now != nullptr && now->device == device ? now : nullptr;
}

// Blocks go back to the device, those that tensors still hold when these go.
void give_back_memory(Recording& recording) {
  std::vector<std::pair<void*, size_t>> unused;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [data, bytes] : recording.owned) owners().erase(data);
    num_owned -= static_cast<int64_t>(recording.owned.size());
    recording.owned.clear();
    for (const auto& [size, blocks] : recording.free) {
      for (void* block : blocks) unused.emplace_back(block, size);
    }
    recording.free.clear();
  }
  for (const auto& [data, bytes] : unused) detail::release_device_memory(recording.device, data, bytes);
}

}  // namespace

void register_graph_support(DeviceKind device, const GraphSupport& support) {
  supports()[static_cast<size_t>(device)] = support;
}

DeviceGraph::DeviceGraph(DeviceKind device, const std::function<void()>& work)
    : recording_(std::make_unique<Recording>()) {
  require(device != DeviceKind::kCpu, "DeviceGraph: the CPU has no queue");
  recording_->device = device;
  Recording* nobody = nullptr;
  require(recorded.compare_exchange_strong(nobody, recording_.get()), "DeviceGraph: another one is being recorded");
  const GraphSupport& support = support_of(device);
  try {
    if (support.begin != nullptr) support.begin();
    work();
    if (support.end != nullptr) recording_->graph = support.end();
  } catch (...) {
    recorded = nullptr;
    if (support.abandon != nullptr) support.abandon();
    give_back_memory(*recording_);
    throw;
  }
  recorded = nullptr;
}

DeviceGraph::~DeviceGraph() {
  if (recording_->graph != nullptr) support_of(recording_->device).release(recording_->graph);
  give_back_memory(*recording_);
}

void DeviceGraph::replay() const {
  if (recording_->graph != nullptr) return support_of(recording_->device).replay(recording_->graph);
  for (const auto& step : recording_->steps) step();
}

int64_t DeviceGraph::bytes() const {
  int64_t sum = 0;
  for (const auto& [data, bytes] : recording_->owned) sum += static_cast<int64_t>(bytes);
  return sum;
}

bool is_recording(DeviceKind device) { return recording_on(device) != nullptr; }
void record_step(std::function<void()> step) { recorded.load()->steps.push_back(std::move(step)); }

void* detail::take_recorded(DeviceKind device, size_t bytes) {
  Recording* recording = recording_on(device);
  if (recording == nullptr) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = recording->free.find(bytes);
  if (found == recording->free.end() || found->second.empty()) return nullptr;
  void* data = found->second.back();
  found->second.pop_back();
  return data;
}

void detail::own_recorded(DeviceKind device, void* data, size_t bytes) {
  Recording* recording = recording_on(device);
  if (recording == nullptr || data == nullptr) return;
  const std::lock_guard<std::mutex> lock(mutex);
  recording->owned.emplace(data, bytes);
  owners().emplace(data, recording);
  ++num_owned;
}

bool detail::keep_recorded(void* data, size_t bytes) {
  if (data == nullptr || num_owned == 0) return false;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto owner = owners().find(data);
  if (owner == owners().end()) return false;
  owner->second->free[bytes].push_back(data);
  return true;
}

bool detail::record_copy(void* to, DeviceKind to_device, const void** from, DeviceKind from_device, size_t bytes) {
  Recording* recording = recorded.load(std::memory_order_relaxed);
  if (recording == nullptr || (to_device != recording->device && from_device != recording->device)) return false;
  require(to_device == recording->device, "DeviceGraph: {} bytes are read from the device while its work is recorded",
          bytes);
  if (from_device != recording->device) {
    auto& kept = recording->host_bytes.emplace_back(std::make_unique<char[]>(bytes));
    std::copy_n(static_cast<const char*>(*from), bytes, kept.get());
    *from = kept.get();
  }
  if (support_of(recording->device).begin != nullptr) return false;  // the device notes it itself
  recording->steps.push_back([=, source = *from] { copy_memory(to, to_device, source, from_device, bytes); });
  return true;
}

bool detail::record_fill(void* data, DeviceKind device, int byte, size_t bytes) {
  Recording* recording = recording_on(device);
  if (recording == nullptr || support_of(device).begin != nullptr) return false;
  recording->steps.push_back([=] { fill_memory(data, device, byte, bytes); });
  return true;
}

}  // namespace lightmoe
