#pragma once
// Owning buffers and the byte accounting that "GB saved" reads.
// Every buffer belongs to one category; live and peak bytes are kept per category and in total, in
// bytes as requested (not rounded). Peak of the total is the peak of the sum, not the sum of peaks.
// Host memory is 64-byte aligned, from huge pages when large; freed blocks are cached for reuse
// (bounded, see trim_cache) because a train step frees and asks for the same sizes every step.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

namespace lightmoe {

enum class DeviceKind : uint8_t { kCpu, kSim, kCuda };
inline constexpr int kNumDeviceKinds = 3;
std::string_view name_of(DeviceKind device);     // "cpu", "sim", "cuda"
DeviceKind device_named(std::string_view name);  // throws Error(kUsage) for another name

// Device of tensors for which none is named: the program sets it once from --device, tests for a scope.
DeviceKind default_device();
void set_default_device(DeviceKind device);
class DeviceScope {
 public:
  explicit DeviceScope(DeviceKind device) : previous_(default_device()) { set_default_device(device); }
  ~DeviceScope() { set_default_device(previous_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  DeviceKind previous_;
};

// Where a device's memory comes from when it is not host memory. cpu is host memory always, sim is unless
// LIGHTMOE_SIM_GUARD=1 registers memory the host cannot touch (kernels/device/simulator/guard.h); cuda registers in builds with CUDA (runtime/cuda_memory.cpp) where there is a GPU.
struct DeviceMemory {
  void* (*allocate)(size_t bytes);  // null when there is no more
  void (*release)(void* data, size_t bytes);
  void (*copy)(void* to, const void* from, size_t bytes);  // to, from or both on the device; complete on return
  void (*fill)(void* data, int byte, size_t bytes);
};
void register_device_memory(DeviceKind device, const DeviceMemory& memory);
bool device_available(DeviceKind device);
bool is_host_memory(DeviceKind device);  // may the host dereference what is allocated there?
void copy_memory(void* to, DeviceKind to_device, const void* from, DeviceKind from_device, size_t bytes);
void fill_memory(void* data, DeviceKind device, int byte, size_t bytes);

enum class MemoryCategory : uint8_t { kWeights, kGradients, kOptimizer, kActivations, kKvCache, kScratch };
inline constexpr int kNumMemoryCategories = 6;
std::string_view name_of(MemoryCategory category);

struct MemoryUse {
  int64_t live_bytes = 0;
  int64_t peak_bytes = 0;
};
MemoryUse memory_use(MemoryCategory category);
MemoryUse memory_use_total();
void reset_peak_memory();          // peaks := live
void trim_memory_cache();          // gives cached free blocks back to the system
int64_t process_peak_rss_bytes();  // VmHWM of this process, 0 where unknown
int64_t process_rss_bytes();

// Allocations made by this thread while the scope lives are booked under the category.
class MemoryScope {
 public:
  explicit MemoryScope(MemoryCategory category);
  ~MemoryScope();
  MemoryScope(const MemoryScope&) = delete;
  MemoryScope& operator=(const MemoryScope&) = delete;
  static MemoryCategory current();  // kActivations outside any scope

 private:
  MemoryCategory previous_;
};

class Buffer {
 public:
  // Uninitialised. Throws Error(kMemory) naming the size when the system refuses.
  static std::shared_ptr<Buffer> allocate(size_t bytes, DeviceKind device, MemoryCategory category);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  DeviceKind device() const { return device_; }
  MemoryCategory category() const { return category_; }

 private:
  Buffer() = default;
  void* data_ = nullptr;
  size_t bytes_ = 0;
  DeviceKind device_ = DeviceKind::kCpu;
  MemoryCategory category_ = MemoryCategory::kActivations;
};

}  // namespace lightmoe
