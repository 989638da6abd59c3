#pragma once
// A caching allocator for the memory of a device, where asking the driver is slow and waits for the device.
// Sizes are rounded up: below 1 MiB to 512 bytes, below 16 MiB to 128 KiB, else to 2 MiB. A freed block is kept under its size and given
// out again for that size. All work of a device stands on one stream, so a block may be reused while kernels that read it are still queued.
// When the device has no more, the kept blocks go back to it and it is asked once more.
// The limit (--max-gpu-memory) is on what is held: given out and kept. Blocks that are kept are given back first.

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace lightmoe {

class DevicePool {
 public:
  // The device's own: allocate gives null when there is no more.
  struct Source {
    void* (*allocate)(size_t bytes);
    void (*release)(void* data, size_t bytes);
  };
  explicit DevicePool(Source source) : source_(source) {}

  void* allocate(size_t bytes);  // null when there is no more, or beyond the limit; null for 0 bytes
  void release(void* data, size_t bytes);
  void trim();                    // kept blocks go back to the device
  void set_limit(int64_t bytes);  // 0: none

  struct Use {
    int64_t given_bytes, kept_bytes;  // rounded sizes
    int64_t from_device, from_pool;   // allocations answered by the one and by the other
  };
  Use use() const;
  static size_t rounded(size_t bytes);

 private:
  bool fits(size_t size) const { return limit_ == 0 || given_ + kept_ + static_cast<int64_t>(size) <= limit_; }
  void trim_locked();

  Source source_;
  mutable std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;
  int64_t limit_ = 0, given_ = 0, kept_ = 0, from_device_ = 0, from_pool_ = 0;
};

}  // namespace lightmoe
