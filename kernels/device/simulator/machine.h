#pragma once
// What kernels, built by a host compiler, call instead of hardware: one fiber per CUDA thread, one block at a time on an OS thread.
// Kernels do not include this; kernels/device/simt.h and ptx.h do. Every operation takes the place in the source it stands at, so that
// a report can name it.
//
// What a run here cannot show: speed, occupancy, bank conflicts of plain accesses, coalescing; what the hardware does between the two
// extremes of asynchrony modelled here (earliest and latest landing); weak memory (all fibers see one order, fences do nothing);
// publication between blocks through flags (blocks are not resident together: a spin on another block's flag ends as a deadlock);
// tensor-core rounding (sums here are f32 in k order), fast-math error and flush to zero; register and occupancy limits; and the text
// of the inline assembly, which only nvcc and a GPU read.

#include <cstddef>
#include <cstdint>
#include <string>

namespace lightmoe::simulator {

struct Site {
  const char* file;
  int line;
};
struct Index3 {
  uint32_t x, y, z;
};
struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

// The part of a simulated thread that kernels read.
struct ThreadView {
  Index3 index;
  int lane, linear;
  const Index3* block_index;
  const Dim3* block_size;
  const Dim3* grid_size;
};
// Thread whose fiber runs on this OS thread; null outside kernels. NOTE: fibers never change OS thread, so its address may be kept.
extern constinit thread_local ThreadView* current_view;

enum class AsyncTiming { kAuto, kEarly, kRandom, kLate };  // when a bulk copy lands, within what is legal

struct Options {
  uint64_t seed = 0;  // 0: fixed order; else random order of warps, lanes and blocks, random landing
  AsyncTiming async = AsyncTiming::kAuto;  // late with seed 0, else random
  double preempt = 0.02;                   // race build with a seed: chance of a switch at a memory access
  size_t stack_bytes = 0;                  // of a fiber; 0: 64 KiB (256 KiB under the address sanitizer)
};
Options& options();  // from LIGHTMOE_SIM_SEED, LIGHTMOE_SIM_ASYNC (early, random, late), LIGHTMOE_SIM_PREEMPT

struct Statistics {
  uint64_t switches = 0, collectives = 0, barriers = 0, mma = 0, wgmma = 0, ldmatrix = 0;
  uint64_t ldmatrix_conflicts = 0;  // extra cycles of ldmatrix rows that share a 16-byte bank group
  uint64_t cp_async = 0, bulk_copies = 0;
  void add(const Statistics& other);
};
Statistics& statistics();  // of all launches so far

// Runs entry(argument) once for every thread of the grid. Throws Error(kDevice) naming kernel, block, thread, file and line, and those of
// the launch.
struct Grid {
  Dim3 blocks, threads;
  size_t shared_bytes;
  Site launched;
};
void launch(const char* kernel, const Grid& grid, void (*entry)(void*), void* argument);

void* shared_memory(size_t bytes, Site site);       // the block's dynamic shared memory, at least this large
uint32_t shared_address(const void* p, Site site);  // 32-bit address as PTX sees it
void check_alignment(const void* p, size_t bytes, Site site);
void yield();  // lets other fibers run
[[noreturn]] void trap(Site site);

enum class BlockReduce { kNone, kCount, kAnd, kOr };
int sync_block(BlockReduce reduce, bool predicate, Site site);
void barrier_sync(int id, int threads, Site site);
void barrier_arrive(int id, int threads, Site site);

enum class Shuffle { kIndex, kUp, kDown, kXor };
enum class WarpReduce { kAdd, kMinU, kMaxU, kMinS, kMaxS, kAnd, kOr, kXor };
void sync_warp(uint32_t mask, Site site);
uint64_t shuffle(uint32_t mask, uint64_t bits, int source, int width, Shuffle mode, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);
uint32_t match_any(uint32_t mask, uint64_t bits, Site site);
uint32_t reduce(uint32_t mask, uint32_t value, WarpReduce op, Site site);
int elect(uint32_t mask, Site site);  // the lane elected; the hardware does not promise which

// Tensor cores and asynchronous copies, called by ptx.h. For everything asynchronous the destination is poisoned at issue (the earliest
// moment the hardware may write) and holds the result once waited for (the latest).
void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, Site site);
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, Site site);
void cp_async(void* shared, const void* global, int bytes, int source_bytes, Site site);
void cp_async_commit(Site site);
void cp_async_wait(int groups_left, Site site);
void mbarrier_init(uint64_t* barrier, uint32_t count, Site site);
void mbarrier_invalidate(uint64_t* barrier, Site site);
void mbarrier_arrive(uint64_t* barrier, uint32_t count, Site site);
void mbarrier_expect_bytes(uint64_t* barrier, uint32_t bytes, Site site);
bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity, Site site);
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site);
void fence_proxy_async(Site site);
void tma_load_2d(void* shared, const void* map, int column, int row, uint64_t* barrier, Site site);
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Site site);
void wgmma_fence(Site site);
struct WgmmaOperands {
  int n;                        // D is 64 x n, f32; A 64 x 16, B n x 16, bf16
  uint64_t a, b;                // descriptors
  const uint32_t* a_registers;  // four of A's registers instead of its descriptor, or null
  bool accumulate, b_mn_major, a_mn_major;
};
void wgmma_bf16(float* d, const WgmmaOperands& operands, Site site);
void wgmma_commit(Site site);
void wgmma_wait(int groups_left, Site site);
void set_max_registers(int count, bool increase, Site site);

}  // namespace lightmoe::simulator
