#pragma once
// PTX of sm_90a: mbarriers that count bytes, bulk copies and TMA, wgmma, setmaxnreg, elect. Kernels that use it guard their body with
// LIGHTMOE_HOPPER_CODE, since the sm_80 pass compiles them too. The pattern of a pipeline stage:
//   one thread: mbarrier_init(&full, 1), fence_mbarrier_init(), then sync_block() for all
//   producer:   mbarrier_arrive_expect_bytes(&full, bytes); tma_load_2d(stage, &map, column, row, &full)
//   consumers:  mbarrier_wait(&full, parity); wgmma_fence(); wgmma...; wgmma_commit(); wgmma_wait<0>(); then free the stage, with one
//               arrival of every consumer warp (wgmma_wait speaks for its own warp)

#include "kernels/device/ptx.h"
#include "kernels/device/ptx_wgmma.h"
#include "kernels/device/tensor_map.h"

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LIGHTMOE_HOPPER_CODE 1
#endif

namespace lightmoe::LIGHTMOE_DEVICE::ptx {

#if defined(__CUDACC__)

DEVICE_FN void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
DEVICE_FN void mbarrier_invalidate(uint64_t* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE_FN void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE_FN void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE_FN void mbarrier_arrive_expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
DEVICE_FN bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}
// Until the phase of this parity is complete: 0 for a barrier's first phase, then alternating.
DEVICE_FN void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}
// Ordinary stores to shared memory before it are visible to wgmma and bulk copies after it.
DEVICE_FN void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE_FN void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// The map's box from (row, column) on; completes the map's full number of bytes on the barrier.
DEVICE_FN void tma_load_2d(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
DEVICE_FN void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

DEVICE_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroupsLeft>
DEVICE_FN void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
}
// Keeps the compiler from moving accesses to accumulator registers across a fence or a wait.
template <int kRegisters>
DEVICE_FN void wgmma_fence_registers(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kRegisters>
DEVICE_FN void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DEVICE_FN void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
DEVICE_FN bool elect_one() {  // true for one lane of the warp, the hardware chooses which
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

#else

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals SITE) {
  simulator::mbarrier_init(barrier, arrivals, site_);
}
inline void mbarrier_invalidate(uint64_t* barrier SITE) { simulator::mbarrier_invalidate(barrier, site_); }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* barrier SITE) { simulator::mbarrier_arrive(barrier, 1, site_); }
inline void mbarrier_arrive_expect_bytes(uint64_t* barrier, uint32_t bytes SITE) {
  simulator::mbarrier_expect_bytes(barrier, bytes, site_);
  simulator::mbarrier_arrive(barrier, 1, site_);
}
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity SITE) {
  return simulator::mbarrier_try_wait(barrier, parity, site_);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity SITE) { simulator::mbarrier_wait(barrier, parity, site_); }
inline void fence_proxy_async(LIGHTMOE_ONLY_SITE) { simulator::fence_proxy_async(site_); }
inline void prefetch_tensor_map(const TensorMap&) {}
inline void tma_load_2d(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier SITE) {
  simulator::tma_load_2d(shared, map.bytes, column, row, barrier, site_);
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier SITE) {
  simulator::bulk_load(shared, global, bytes, barrier, site_);
}
inline void wgmma_fence(LIGHTMOE_ONLY_SITE) { simulator::wgmma_fence(site_); }
inline void wgmma_commit(LIGHTMOE_ONLY_SITE) { simulator::wgmma_commit(site_); }
template <int kGroupsLeft>
void wgmma_wait(LIGHTMOE_ONLY_SITE) {
  simulator::wgmma_wait(kGroupsLeft, site_);
}
template <int kRegisters>
void wgmma_fence_registers(float (&)[kRegisters]) {}
template <int kRegisters>
void increase_registers(LIGHTMOE_ONLY_SITE) {
  simulator::set_max_registers(kRegisters, true, site_);
}
template <int kRegisters>
void decrease_registers(LIGHTMOE_ONLY_SITE) {
  simulator::set_max_registers(kRegisters, false, site_);
}
inline bool elect_one(LIGHTMOE_ONLY_SITE) {
  return simulator::elect(kFullWarp, site_) == simulator::current_view->lane;
}

#endif

// Descriptors of operands that TMA brought with a 128-byte swizzle: rows of 64 bf16, groups of 8 rows 1024 bytes apart. The tile starts at
// a multiple of 1024 bytes.
namespace detail {
constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
DEVICE_FN uint64_t descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kSwizzle128;
}
}  // namespace detail
// K along the row: the next 16 of k are 32 bytes further: descriptor + 2.
DEVICE_FN uint64_t wgmma_descriptor_k_major(const void* tile) {
  return detail::descriptor(shared_address(tile), 16, 1024);
}
// MN along the row (B^T): each 64 columns form a tile of k rows, the next tile is tile_bytes further; the next 16 of k are 2048 bytes
// further: descriptor + 128.
DEVICE_FN uint64_t wgmma_descriptor_mn_major(const void* tile, uint32_t tile_bytes) {
  return detail::descriptor(shared_address(tile), tile_bytes, 1024);
}

}  // namespace lightmoe::LIGHTMOE_DEVICE::ptx
