#include "runtime/device.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr size_t kPieceBytes = size_t{8} << 20;

std::array<DeviceQueue, kNumDeviceKinds>& queues() {
  static std::array<DeviceQueue, kNumDeviceKinds> table = {};  // filled by static objects of other files
  return table;
}
std::array<DeviceConvert, kNumDeviceKinds>& converters() {
  static std::array<DeviceConvert, kNumDeviceKinds> table = {};
  return table;
}
const DeviceQueue& queue_of(DeviceKind device) { return queues()[static_cast<size_t>(device)]; }

std::atomic<int64_t> to_host{0}, to_device{0}, limit{0}, live{0};

}  // namespace

void register_device_queue(DeviceKind device, const DeviceQueue& queue) {
  queues()[static_cast<size_t>(device)] = queue;
}

void* compute_stream(DeviceKind device) {
  const auto stream = queue_of(device).stream;
  return stream != nullptr ? stream() : nullptr;
}
void wait_for_device(DeviceKind device) {
  if (const auto wait = queue_of(device).wait) wait();
}

TransferCounts transfer_counts() { return {to_host.load(), to_device.load()}; }
void detail::count_transfer(bool is_to_host) { ++(is_to_host ? to_host : to_device); }

void set_device_memory_limit(int64_t bytes) {
  limit = bytes;
  for (const DeviceQueue& queue : queues()) {
    if (queue.set_limit != nullptr) queue.set_limit(bytes);
  }
}
int64_t device_memory_limit() { return limit.load(); }
int64_t device_live_bytes() { return live.load(); }

int64_t device_free_bytes() {
  const auto ask = queue_of(DeviceKind::kCuda).free_bytes;
  int64_t room = ask != nullptr ? ask() : -1;
  if (limit > 0) {
    const int64_t below_limit = std::max<int64_t>(0, limit - live);
    room = room < 0 ? below_limit : std::min(room, below_limit);
  }
  return room;
}

bool detail::book_device_bytes(int64_t bytes) {
  const int64_t now = live.fetch_add(bytes) + bytes;
  if (bytes <= 0 || limit == 0 || now <= limit) return true;
  live -= bytes;
  return false;
}

void upload(DeviceKind device, void* to, size_t bytes,
            const std::function<void(void* piece, size_t offset, size_t count)>& read) {
  if (bytes == 0) return;
  const DeviceQueue& queue = queue_of(device);
  const size_t piece = std::min(bytes, kPieceBytes);
  const bool locked = queue.allocate_staging != nullptr;
  using Staging = std::unique_ptr<void, void (*)(void*)>;
  const auto make = [&] {
    return Staging(locked ? queue.allocate_staging(piece) : std::malloc(piece),
                   locked ? queue.release_staging : &std::free);
  };
  const Staging slots[2] = {make(), bytes > piece ? make() : Staging(nullptr, &std::free)};
  check(slots[0] != nullptr && (bytes <= piece || slots[1] != nullptr), ErrorKind::kMemory,
        "out of host memory: {} bytes of staging", piece);
  int slot = 0;
  for (size_t offset = 0; offset < bytes; offset += piece, slot ^= 1) {
    const size_t count = std::min(piece, bytes - offset);
    if (locked) queue.wait_upload(slot);  // what was last sent from here has left
    read(slots[slot].get(), offset, count);
    char* target = static_cast<char*>(to) + offset;
    locked ? queue.upload(target, slots[slot].get(), count, slot)
           : copy_memory(target, device, slots[slot].get(), DeviceKind::kCpu, count);
  }
  if (locked) queue.wait_upload(0), queue.wait_upload(1);
}

RegisterDeviceConvert::RegisterDeviceConvert(DeviceKind device, DeviceConvert convert) {
  converters()[static_cast<size_t>(device)] = convert;
}
bool convert_on_device(DeviceKind device, const void* from, DType from_type, void* to, DType to_type, size_t count) {
  const DeviceConvert convert = converters()[static_cast<size_t>(device)];
  return convert != nullptr && convert(from, from_type, to, to_type, count);
}

}  // namespace lightmoe
