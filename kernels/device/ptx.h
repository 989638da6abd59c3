#pragma once
// Every PTX instruction the kernels use: inline assembly for nvcc, a call into the simulator otherwise. Numbers refer to the PTX ISA's
// instruction descriptions. Tensor maps stand in tensor_map.h, wgmma's operand forms in ptx_wgmma.h.
// sm_80: bar, cp.async, ldmatrix, mma.sync, cvt to bf16. sm_90a: mbarrier with bytes, TMA, bulk copies, fences between proxies, wgmma,
// setmaxnreg, elect.

#include "kernels/device/simt.h"

namespace lightmoe::LIGHTMOE_DEVICE::ptx {

#if defined(__CUDACC__)

DEVICE_FN uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

DEVICE_FN bf16 to_bf16(float value) {
  bf16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
}
DEVICE_FN uint32_t to_bf16x2(float first, float second) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  return out;
}

// Named barriers 0 to 15 over `threads` threads, a multiple of 32. sync waits, arrive does not.
DEVICE_FN void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE_FN void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#else

inline uint32_t shared_address(const void* p SITE) { return simulator::shared_address(p, site_); }
inline bf16 to_bf16(float value) { return bf16(value); }
inline uint32_t to_bf16x2(float first, float second) {
  return static_cast<uint32_t>(bf16(first).bits) | static_cast<uint32_t>(bf16(second).bits) << 16;
}
inline void barrier_sync(int id, int threads SITE) { simulator::barrier_sync(id, threads, site_); }
inline void barrier_arrive(int id, int threads SITE) { simulator::barrier_arrive(id, threads, site_); }

#endif

}  // namespace lightmoe::LIGHTMOE_DEVICE::ptx
