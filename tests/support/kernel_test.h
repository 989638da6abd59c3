#pragma once
// Tests written as kernels (tests/*.cu): each runs in the simulator and, in builds with CUDA, on the GPU.
//   DEVICE_TEST(Suite, Name) { ... }     the test is called SimSuite.Name, and CudaSuite.Name

#include <gtest/gtest.h>

#include <vector>

#include "kernels/device/simt.h"
#include "runtime/tensor.h"

#if defined(__CUDACC__)
#define DEVICE_TEST(suite, name) LIGHTMOE_DEVICE_TEST(Cuda##suite, name)
#else
#define DEVICE_TEST(suite, name) LIGHTMOE_DEVICE_TEST(Sim##suite, name)
#endif
#define LIGHTMOE_DEVICE_TEST(suite, name)                                                 \
  void suite##_##name##_body();                                                           \
  TEST(suite, name) {                                                                     \
    if (!device_available(kDevice)) GTEST_SKIP() << "no " << name_of(kDevice) << " here"; \
    suite##_##name##_body();                                                              \
  }                                                                                       \
  void suite##_##name##_body()

namespace lightmoe::LIGHTMOE_DEVICE {

// An array on the device that tests fill and read.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values) : size_(values.size()), bytes_(sized(values.size())) {
    copy_memory(data(), kDevice, values.data(), DeviceKind::kCpu, size_ * sizeof(T));
  }
  explicit DeviceArray(size_t size) : DeviceArray(std::vector<T>(size)) {}
  T* data() const { return static_cast<T*>(bytes_.raw()); }
  std::vector<T> values() const {
    std::vector<T> out(size_);
    copy_memory(out.data(), DeviceKind::kCpu, data(), kDevice, size_ * sizeof(T));
    return out;
  }

 private:
  static Tensor sized(size_t size) {
    return Tensor::empty({static_cast<int64_t>(size * sizeof(T))}, DType::kU8, kDevice);
  }
  size_t size_;
  Tensor bytes_;
};

}  // namespace lightmoe::LIGHTMOE_DEVICE
