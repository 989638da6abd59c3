#pragma once
// PTX of sm_80 as functions: inline assembly for nvcc, a call into the simulator otherwise. What Hopper adds stands in ptx_hopper.h.
// Asynchronous copies: cp_async_16 ... cp_async_commit() closes a group; cp_async_wait<N>() waits until at most N groups of this thread
// are open; then sync_block() before other threads read what it brought.
// mma_m16n8k16 fragments: lane l holds of D rows l/4 and l/4+8, columns 2(l%4), +1 (simulator/layouts.h has all maps).

#include <cmath>

#include "kernels/device/simt.h"

namespace lightmoe::LIGHTMOE_DEVICE::ptx {

#if defined(__CUDACC__)

DEVICE_FN uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

DEVICE_FN bf16 to_bf16(float value) {
  bf16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
}
DEVICE_FN uint32_t to_bf16x2(float first, float second) {  // the first in the lower half
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  return out;
}

DEVICE_FN float exp2_approximate(float x) {  // 2 ulp; results below 2^-126 are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Named barriers 0 to 15 over `threads` threads, a multiple of 32. sync waits, arrive does not.
DEVICE_FN void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE_FN void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 16 (4) bytes from global to shared memory; source_bytes of them are read, the rest is zeros. 16: past L1.
DEVICE_FN void cp_async_16(void* shared, const void* global, int source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(source_bytes)
               : "memory");
}
DEVICE_FN void cp_async_4(void* shared, const void* global, int source_bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(source_bytes)
               : "memory");
}
DEVICE_FN void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
DEVICE_FN void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// Four (two) 8x8 matrices of 16-bit elements; lanes 8i to 8i+7 give the row addresses of matrix i.
DEVICE_FN void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE_FN void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE_FN void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE_FN void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// D (16x8, f32) += A (16x16, bf16, row) B (16x8, bf16, column)
DEVICE_FN void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

inline uint32_t shared_address(const void* p SITE) { return simulator::shared_address(p, site_); }
inline bf16 to_bf16(float value) { return bf16(value); }
inline uint32_t to_bf16x2(float first, float second) {
  return static_cast<uint32_t>(bf16(first).bits) | static_cast<uint32_t>(bf16(second).bits) << 16;
}
inline float exp2_approximate(float x) { return std::exp2(x); }
inline void barrier_sync(int id, int threads SITE) { simulator::barrier_sync(id, threads, site_); }
inline void barrier_arrive(int id, int threads SITE) { simulator::barrier_arrive(id, threads, site_); }
inline void cp_async_16(void* shared, const void* global, int source_bytes = 16 SITE) {
  simulator::cp_async(shared, global, 16, source_bytes, site_);
}
inline void cp_async_4(void* shared, const void* global, int source_bytes = 4 SITE) {
  simulator::cp_async(shared, global, 4, source_bytes, site_);
}
inline void cp_async_commit(LIGHTMOE_ONLY_SITE) { simulator::cp_async_commit(site_); }
template <int kGroupsLeft>
void cp_async_wait(LIGHTMOE_ONLY_SITE) {
  simulator::cp_async_wait(kGroupsLeft, site_);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row SITE) { simulator::ldmatrix(r, row, 4, false, site_); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row SITE) { simulator::ldmatrix(r, row, 4, true, site_); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row SITE) { simulator::ldmatrix(r, row, 2, false, site_); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row SITE) { simulator::ldmatrix(r, row, 2, true, site_); }
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] SITE) {
  simulator::mma_m16n8k16_bf16(d, a, b, site_);
}

#endif

void cp_async_16(void*, const void*, bool) = delete;  // a count of bytes, not a condition
void cp_async_4(void*, const void*, bool) = delete;

}  // namespace lightmoe::LIGHTMOE_DEVICE::ptx
