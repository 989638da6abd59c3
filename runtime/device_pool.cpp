#include "runtime/device_pool.h"

namespace lightmoe {

size_t DevicePool::rounded(size_t bytes) {
  const size_t unit = bytes < (size_t{1} << 20)    ? 512
                      : bytes < (size_t{16} << 20) ? size_t{128} << 10
                                                   : size_t{2} << 20;
  return (bytes + unit - 1) / unit * unit;
}

void* DevicePool::allocate(size_t bytes) {
  if (bytes == 0) return nullptr;
  const size_t size = rounded(bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  void* block = nullptr;
  if (const auto kept = free_.find(size); kept != free_.end() && !kept->second.empty()) {
    block = kept->second.back();
    kept->second.pop_back();
    kept_ -= static_cast<int64_t>(size), ++from_pool_;
  } else {
    if (!fits(size)) trim_locked();
    if (!fits(size)) return nullptr;
    block = source_.allocate(size);
    if (block == nullptr) {
      trim_locked();
      block = source_.allocate(size);
    }
    if (block == nullptr) return nullptr;
    ++from_device_;
  }
  given_ += static_cast<int64_t>(size);
  return block;
}

void DevicePool::release(void* data, size_t bytes) {
  if (data == nullptr) return;
  const size_t size = rounded(bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  free_[size].push_back(data);
  given_ -= static_cast<int64_t>(size), kept_ += static_cast<int64_t>(size);
}

void DevicePool::trim() {
  const std::lock_guard<std::mutex> lock(mutex_);
  trim_locked();
}

void DevicePool::trim_locked() {
  for (auto& [size, blocks] : free_) {
    for (void* block : blocks) source_.release(block, size);
  }
  free_.clear();
  kept_ = 0;
}

void DevicePool::set_limit(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes;
}

DevicePool::Use DevicePool::use() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {given_, kept_, from_device_, from_pool_};
}

}  // namespace lightmoe
