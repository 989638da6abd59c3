#pragma once
// What the simulator tells the race detector (race.cpp); nothing is compiled in outside the race build.

#include "kernels/device/simulator/internal.h"

namespace lightmoe::simulator::race {

#ifdef LIGHTMOE_RACE
inline constexpr bool kEnabled = true;
void launch_begin(uint32_t num_blocks);
void block_begin(Block& block);
void release(Thread* thread, VectorClock& into);  // into = max(into, clock of thread); then the thread's clock ticks
void acquire(Thread* thread, const VectorClock& from);
void sync_warp(Warp& warp, uint32_t lanes);
// By simulator code on a thread's behalf.
void access(Thread* thread, const void* p, size_t bytes, bool write, bool atomic, Site site);
void copy_begin(Thread* thread, const void* to, size_t bytes, Site site);
void copy_end(Thread* thread, const void* to, size_t bytes, Site site);  // visible to the thread
void bulk_copy_end(Block& block, const void* to, size_t bytes, Site site,
                   VectorClock& into);  // to who waits on the barrier
void wgmma_read_begin(Warp& warp, const void* p, size_t bytes, Site site);
void wgmma_read_end(Warp& warp, const void* p, size_t bytes, Site site);
void wgmma_done(Warp& warp);  // every lane of the warp knows that the reads are over
void proxy_fence(Thread* thread);
std::string take_reports();
#else
inline constexpr bool kEnabled = false;
inline void launch_begin(uint32_t) {}
inline void block_begin(Block&) {}
inline void release(Thread*, VectorClock&) {}
inline void acquire(Thread*, const VectorClock&) {}
inline void sync_warp(Warp&, uint32_t) {}
inline void access(Thread*, const void*, size_t, bool, bool, Site) {}
inline void copy_begin(Thread*, const void*, size_t, Site) {}
inline void copy_end(Thread*, const void*, size_t, Site) {}
inline void bulk_copy_end(Block&, const void*, size_t, Site, VectorClock&) {}
inline void wgmma_read_begin(Warp&, const void*, size_t, Site) {}
inline void wgmma_read_end(Warp&, const void*, size_t, Site) {}
inline void wgmma_done(Warp&) {}
inline void proxy_fence(Thread*) {}
inline std::string take_reports() { return {}; }
#endif

}  // namespace lightmoe::simulator::race
