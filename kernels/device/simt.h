#pragma once
// The one header through which kernels see the machine. nvcc: CUDA. Any other compiler: the SIMT simulator (kernels/device/simulator),
// where a block's threads run as fibers on the host; what that cannot show stands in simulator/machine.h.
//
// A kernel file (kernels/<op>.cu) opens `namespace lightmoe::LIGHTMOE_DEVICE { namespace {`, which is lightmoe::cuda or lightmoe::sim, so
// that both builds link into one binary; it registers its launchers for kDevice. In it stand:
//   __global__, __launch_bounds__(threads), threadIdx, blockIdx, blockDim, gridDim      as in CUDA
//   sync_block() sync_block_count/and/or(p) sync_warp()                                 barriers of a block, of a warp
//   shuffle shuffle_up shuffle_down shuffle_xor, ballot any all match_any, reduce_add/min/max (integers)
//   atomic_add atomic_max atomic_min atomic_exchange atomic_cas                         return the old value
//   Shared& s = shared_memory<Shared>()                                                 the block's shared memory is one struct
//   launch<kernel<T>>({.blocks = {n}, .threads = {256}, .shared_bytes = sizeof(Shared)}, arguments...)
// Helpers: device/reduce.h (sums over a warp or block), device/vector.h (16-byte accesses), device/numeric.h (conversions, fast
// functions), device/ptx.h (every PTX instruction). std::min, std::max and other constexpr functions may be used in kernels.
// Rules: no thread returns before a barrier that others reach; no asm, no <<<, no CUDA header outside this folder.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime/device.h"
#include "runtime/device_graph.h"
#include "runtime/dtype.h"
#include "runtime/error.h"
#include "runtime/memory.h"

#if defined(__CUDACC__)

#include <cuda.h>
#include <cuda_runtime.h>
#define LIGHTMOE_DEVICE cuda
#define DEVICE_FN __device__ __forceinline__
// Helpers pass the caller's place on to the simulator: f(int x SITE) { g(x HERE); }
#define SITE
#define HERE
#define HERE_ONLY

namespace lightmoe::cuda {

inline constexpr DeviceKind kDevice = DeviceKind::kCuda;
inline constexpr unsigned kFullWarp = 0xffffffffu;
using Dim3 = dim3;
struct Launch {
  Dim3 blocks, threads;
  size_t shared_bytes = 0;
  const char* file = __builtin_FILE();  // where the launch stands, for errors
  int line = __builtin_LINE();
};

inline void check_cuda(cudaError_t error, const char* what) {
  check(error == cudaSuccess, ErrorKind::kDevice, "cuda: {}: {}", what, cudaGetErrorString(error));
}
inline void check_launch(cudaError_t error, const Launch& config, const char* kernel) {
  check(error == cudaSuccess, ErrorKind::kDevice, "cuda: {}: {}; launched at {}:{}", kernel, cudaGetErrorString(error),
        config.file, config.line);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "the current device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "attribute of the device");
  return value;
}
inline int multiprocessors() {
  static const int count = device_attribute(cudaDevAttrMultiProcessorCount);
  return count;
}
inline int compute_capability() {  // 90 for sm_90
  static const int value =
      10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
  return value;
}

// LIGHTMOE_SYNC=1: every launch is waited for, so that an error names the kernel that made it and not one after it.
inline bool wait_after_launch() {
  static const bool wait = std::getenv("LIGHTMOE_SYNC") != nullptr && *std::getenv("LIGHTMOE_SYNC") == '1';
  return wait;
}

// On the device's one stream. A grid without blocks launches nothing.
template <auto kKernel, class... Arguments>
void launch(const Launch& config, Arguments&&... arguments) {
  if (config.blocks.x == 0 || config.blocks.y == 0 || config.blocks.z == 0) return;
  if (config.shared_bytes > 48 * 1024) {
    check_launch(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(config.shared_bytes)),
        config, __PRETTY_FUNCTION__);
  }
  const auto stream = static_cast<cudaStream_t>(compute_stream(kDevice));
  kKernel<<<config.blocks, config.threads, config.shared_bytes, stream>>>(std::forward<Arguments>(arguments)...);
  check_launch(cudaGetLastError(), config, __PRETTY_FUNCTION__);
  if (!wait_after_launch() || is_recording(kDevice)) return;
  check_launch(cudaStreamSynchronize(stream), config, __PRETTY_FUNCTION__);
}

template <class T>
DEVICE_FN T& shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  return *reinterpret_cast<T*>(dynamic_shared);
}

DEVICE_FN void sync_block() { __syncthreads(); }
DEVICE_FN int sync_block_count(bool predicate) { return __syncthreads_count(predicate); }
DEVICE_FN bool sync_block_and(bool predicate) { return __syncthreads_and(predicate) != 0; }
DEVICE_FN bool sync_block_or(bool predicate) { return __syncthreads_or(predicate) != 0; }
DEVICE_FN void sync_warp(unsigned mask = kFullWarp) { __syncwarp(mask); }

template <class T>
DEVICE_FN T shuffle(T value, int source, int width = 32, unsigned mask = kFullWarp) {
  return __shfl_sync(mask, value, source, width);
}
template <class T>
DEVICE_FN T shuffle_up(T value, int distance, int width = 32, unsigned mask = kFullWarp) {
  return __shfl_up_sync(mask, value, static_cast<unsigned>(distance), width);
}
template <class T>
DEVICE_FN T shuffle_down(T value, int distance, int width = 32, unsigned mask = kFullWarp) {
  return __shfl_down_sync(mask, value, static_cast<unsigned>(distance), width);
}
template <class T>
DEVICE_FN T shuffle_xor(T value, int lane_mask, int width = 32, unsigned mask = kFullWarp) {
  return __shfl_xor_sync(mask, value, lane_mask, width);
}
DEVICE_FN unsigned ballot(bool predicate, unsigned mask = kFullWarp) { return __ballot_sync(mask, predicate); }
DEVICE_FN bool any(bool predicate, unsigned mask = kFullWarp) { return __any_sync(mask, predicate) != 0; }
DEVICE_FN bool all(bool predicate, unsigned mask = kFullWarp) { return __all_sync(mask, predicate) != 0; }
template <class T>
DEVICE_FN unsigned match_any(T value, unsigned mask = kFullWarp) {
  return __match_any_sync(mask, value);
}
template <class T>  // int or unsigned
DEVICE_FN T reduce_add(T value, unsigned mask = kFullWarp) {
  return __reduce_add_sync(mask, value);
}
template <class T>
DEVICE_FN T reduce_min(T value, unsigned mask = kFullWarp) {
  return __reduce_min_sync(mask, value);
}
template <class T>
DEVICE_FN T reduce_max(T value, unsigned mask = kFullWarp) {
  return __reduce_max_sync(mask, value);
}

template <class T>
DEVICE_FN T atomic_add(T* p, std::type_identity_t<T> value) {
  return atomicAdd(p, value);
}
template <class T>
DEVICE_FN T atomic_max(T* p, std::type_identity_t<T> value) {
  return atomicMax(p, value);
}
template <class T>
DEVICE_FN T atomic_min(T* p, std::type_identity_t<T> value) {
  return atomicMin(p, value);
}
template <class T>
DEVICE_FN T atomic_exchange(T* p, std::type_identity_t<T> value) {
  return atomicExch(p, value);
}
template <class T>
DEVICE_FN T atomic_cas(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return atomicCAS(p, expected, value);
}
DEVICE_FN void thread_fence_block() { __threadfence_block(); }
DEVICE_FN void thread_fence() { __threadfence(); }
DEVICE_FN void trap() { __trap(); }

}  // namespace lightmoe::cuda

#else

#include "kernels/device/simt_host.h"

#endif

namespace lightmoe::LIGHTMOE_DEVICE {

// Of blocks with one dimension.
DEVICE_FN int lane_id() { return static_cast<int>(threadIdx.x % 32); }
DEVICE_FN int warp_id() { return static_cast<int>(threadIdx.x / 32); }
template <class T>
constexpr T ceil_div(T a, std::type_identity_t<T> b) {
  return (a + b - 1) / b;
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
