#include "runtime/memory.h"

#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "runtime/device.h"
#include "runtime/device_graph.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

struct Account {
  std::atomic<int64_t> live{0};
  std::atomic<int64_t> peak{0};
  void add(int64_t bytes) {
    const int64_t now = live.fetch_add(bytes) + bytes;
    int64_t seen = peak.load();
    while (now > seen && !peak.compare_exchange_weak(seen, now)) {
    }
  }
};
std::array<Account, kNumMemoryCategories> accounts;
Account total_account;
thread_local MemoryCategory current_category = MemoryCategory::kActivations;

std::atomic<DeviceKind> current_device{DeviceKind::kCpu};
std::array<DeviceMemory, kNumDeviceKinds>& device_memory() {
  static std::array<DeviceMemory, kNumDeviceKinds> table = {};  // filled by static objects of other files
  return table;
}

// Blocks of at least kLargeBytes come from mmap in units of a huge page and are cached by size.
constexpr size_t kLargeBytes = size_t{1} << 20;
constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr size_t kMaxCachedBytes = size_t{512} << 20;

size_t rounded_size(size_t bytes) {
  if (bytes < kLargeBytes) return (bytes + 63) & ~size_t{63};
  const size_t unit = bytes < (size_t{16} << 20) ? (size_t{1} << 20) : kHugePageBytes;
  return (bytes + unit - 1) / unit * unit;
}

class LargeBlocks {
 public:
  void* take(size_t rounded) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto it = free_.find(rounded);
      if (it != free_.end() && !it->second.empty()) {
        void* block = it->second.back();
        it->second.pop_back();
        cached_bytes_ -= rounded;
        return block;
      }
    }
    void* block = map(rounded);
    if (block == nullptr) {
      trim();
      block = map(rounded);
    }
    return block;
  }
  void give(void* block, size_t rounded) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (cached_bytes_ + rounded <= kMaxCachedBytes) {
        free_[rounded].push_back(block);
        cached_bytes_ += rounded;
        return;
      }
    }
    munmap(block, rounded);
  }
  void trim() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [size, blocks] : free_) {
      for (void* block : blocks) munmap(block, size);
    }
    free_.clear();
    cached_bytes_ = 0;
  }

 private:
  static void* map(size_t bytes) {
    void* block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) return nullptr;
    if (bytes >= kHugePageBytes) madvise(block, bytes, MADV_HUGEPAGE);
    return block;
  }
  std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;
  size_t cached_bytes_ = 0;
};
LargeBlocks& large_blocks() {
  static LargeBlocks* blocks = new LargeBlocks;  // outlives static tensors
  return *blocks;
}

void* allocate_host(size_t bytes) {
  const size_t rounded = rounded_size(bytes);
  if (rounded >= kLargeBytes) return large_blocks().take(rounded);
  return rounded > 0 ? std::aligned_alloc(64, rounded) : nullptr;
}
void release_host(void* data, size_t bytes) {
  const size_t rounded = rounded_size(bytes);
  rounded >= kLargeBytes ? large_blocks().give(data, rounded) : std::free(data);
}

int64_t status_kib(const char* key) {
  std::FILE* file = std::fopen("/proc/self/status", "r");
  if (file == nullptr) return 0;
  char line[256];
  int64_t kib = 0;
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::strncmp(line, key, std::strlen(key)) == 0) {
      kib = std::atoll(line + std::strlen(key));
      break;
    }
  }
  std::fclose(file);
  return kib;
}

}  // namespace

std::string_view name_of(DeviceKind device) {
  constexpr std::string_view names[] = {"cpu", "sim", "cuda"};
  return names[static_cast<int>(device)];
}
DeviceKind device_named(std::string_view name) {
  for (int i = 0; i < kNumDeviceKinds; ++i) {
    if (name_of(static_cast<DeviceKind>(i)) == name) return static_cast<DeviceKind>(i);
  }
  fail(ErrorKind::kUsage, "device {}: expected cpu, sim or cuda", name);
}
DeviceKind default_device() { return current_device.load(std::memory_order_relaxed); }
void set_default_device(DeviceKind device) { current_device = device; }

void register_device_memory(DeviceKind device, const DeviceMemory& memory) {
  device_memory()[static_cast<size_t>(device)] = memory;
}
bool device_available(DeviceKind device) {
  return device != DeviceKind::kCuda || device_memory()[static_cast<size_t>(device)].allocate != nullptr;
}
bool is_host_memory(DeviceKind device) { return device_memory()[static_cast<size_t>(device)].allocate == nullptr; }
void copy_memory(void* to, DeviceKind to_device, const void* from, DeviceKind from_device, size_t bytes) {
  if (bytes == 0 || detail::record_copy(to, to_device, &from, from_device, bytes)) return;
  if (to_device != from_device) detail::count_transfer(to_device == DeviceKind::kCpu);
  const DeviceKind foreign = is_host_memory(to_device) ? from_device : to_device;
  const auto copy = device_memory()[static_cast<size_t>(foreign)].copy;
  copy != nullptr ? copy(to, from, bytes) : static_cast<void>(std::memcpy(to, from, bytes));
}
void fill_memory(void* data, DeviceKind device, int byte, size_t bytes) {
  if (bytes == 0 || detail::record_fill(data, device, byte, bytes)) return;
  const auto fill = device_memory()[static_cast<size_t>(device)].fill;
  fill != nullptr ? fill(data, byte, bytes) : static_cast<void>(std::memset(data, byte, bytes));
}

std::string_view name_of(MemoryCategory category) {
  constexpr std::string_view names[] = {"weights", "gradients", "optimizer", "activations", "kv_cache", "scratch"};
  return names[static_cast<int>(category)];
}

MemoryUse memory_use(MemoryCategory category) {
  const Account& account = accounts[static_cast<size_t>(category)];
  return {account.live.load(), account.peak.load()};
}
MemoryUse memory_use_total() { return {total_account.live.load(), total_account.peak.load()}; }
void reset_peak_memory() {
  for (Account& account : accounts) account.peak = account.live.load();
  total_account.peak = total_account.live.load();
}
void trim_memory_cache() { large_blocks().trim(); }
int64_t process_peak_rss_bytes() { return status_kib("VmHWM:") * 1024; }
int64_t process_rss_bytes() { return status_kib("VmRSS:") * 1024; }

MemoryScope::MemoryScope(MemoryCategory category) : previous_(current_category) { current_category = category; }
MemoryScope::~MemoryScope() { current_category = previous_; }
MemoryCategory MemoryScope::current() { return current_category; }

// A block that the graph being recorded has free, else one of the device, which becomes the graph's. Null when there is no more.
static void* allocate_on_device(size_t bytes, DeviceKind device, MemoryCategory category) {
  if (void* kept = detail::take_recorded(device, bytes)) return kept;
  check(detail::book_device_bytes(static_cast<int64_t>(bytes)), ErrorKind::kMemory,
        "out of {} memory: {} bytes asked for {}, {} bytes live, limit {} (--max-gpu-memory)", name_of(device), bytes,
        name_of(category), device_live_bytes(), device_memory_limit());
  const auto allocate = device_memory()[static_cast<size_t>(device)].allocate;
  void* data = allocate != nullptr ? allocate(bytes) : allocate_host(bytes);
  if (data == nullptr) detail::book_device_bytes(-static_cast<int64_t>(bytes));
  detail::own_recorded(device, data, bytes);
  return data;
}
void detail::release_device_memory(DeviceKind device, void* data, size_t bytes) {
  const auto release = device_memory()[static_cast<size_t>(device)].release;
  release != nullptr ? release(data, bytes) : release_host(data, bytes);
  if (data != nullptr) book_device_bytes(-static_cast<int64_t>(bytes));
}

std::shared_ptr<Buffer> Buffer::allocate(size_t bytes, DeviceKind device, MemoryCategory category) {
  check(device_available(device), ErrorKind::kDevice, "device {}: not in this build, or none in this machine",
        name_of(device));
  void* data = device == DeviceKind::kCpu ? allocate_host(bytes) : allocate_on_device(bytes, device, category);
  check(data != nullptr || bytes == 0, ErrorKind::kMemory, "out of {} memory: {} bytes asked for {}, {} bytes live",
        device == DeviceKind::kCuda ? "cuda" : "host", bytes, name_of(category), total_account.live.load());
  std::shared_ptr<Buffer> buffer(new Buffer);
  buffer->data_ = data;
  buffer->bytes_ = bytes;
  buffer->device_ = device;
  buffer->category_ = category;
  accounts[static_cast<size_t>(category)].add(static_cast<int64_t>(bytes));
  total_account.add(static_cast<int64_t>(bytes));
  if (device == DeviceKind::kSim) fill_memory(data, device, 0xff, bytes);  // NaN where a kernel reads what nobody wrote
  return buffer;
}

Buffer::~Buffer() {
  if (device_ == DeviceKind::kCpu) {
    release_host(data_, bytes_);
  } else if (!detail::keep_recorded(data_, bytes_)) {
    detail::release_device_memory(device_, data_, bytes_);
  }
  accounts[static_cast<size_t>(category_)].live -= static_cast<int64_t>(bytes_);
  total_account.live -= static_cast<int64_t>(bytes_);
}

}  // namespace lightmoe
