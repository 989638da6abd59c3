// Memory of the GPU, in builds with CUDA (make CUDA=1); nothing otherwise. Registers only where a GPU answers.
#ifdef LIGHTMOE_CUDA

#include <cuda_runtime.h>

#include "runtime/error.h"
#include "runtime/memory.h"

namespace lightmoe {
namespace {

void check_cuda(cudaError_t error, const char* what, size_t bytes) {
  check(error == cudaSuccess, ErrorKind::kDevice, "cuda: {} of {} bytes: {}", what, bytes, cudaGetErrorString(error));
}

void* allocate(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // an allocation that does not fit leaves the device usable
    return nullptr;
  }
  check_cuda(error, "allocation", bytes);
  return data;
}
void release(void* data, size_t) { cudaFree(data); }
void copy(void* to, const void* from, size_t bytes) {
  check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "copy", bytes);
  check_cuda(cudaDeviceSynchronize(), "copy", bytes);
}
void fill(void* data, int byte, size_t bytes) { check_cuda(cudaMemset(data, byte, bytes), "fill", bytes); }

const bool registered = [] {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return false;
  register_device_memory(DeviceKind::kCuda, {&allocate, &release, &copy, &fill});
  return true;
}();

}  // namespace
}  // namespace lightmoe

#endif
