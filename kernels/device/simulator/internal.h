#pragma once
// State of the simulator, shared by its own files only.

#include <fmt/core.h>

#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/device/simulator/fiber.h"
#include "kernels/device/simulator/machine.h"

namespace lightmoe::simulator {

inline constexpr uint32_t kFullWarp = 0xffffffffu;
inline constexpr int kMaxThreads = 1024, kMaxWarps = 32;
inline constexpr uint32_t kSharedBase = 1024;         // shared addresses start here, so that 0 is never a valid one
inline constexpr uint32_t kSharedBytes = 227 * 1024;  // what one block of sm_90 may use

using VectorClock = std::vector<uint32_t>;  // race build only

struct Random {
  uint64_t state = 1;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545F4914F6CDD1Dull;
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 33) % n); }
};

struct Block;
struct Warp;

struct AsyncCopy {  // a cp.async that has been issued
  unsigned char* to;
  const unsigned char* from;
  int bytes, source_bytes;
  unsigned char data[16];
  Site site;
};

struct Thread : ThreadView {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  bool started = false, done = false;
  const char* waits_in = nullptr;
  Site waits_at{};
  int barrier_result = 0;
  std::vector<AsyncCopy> open_copies;
  std::vector<std::vector<AsyncCopy>> copy_groups;
};

// A warp collective: the last lane to arrive computes for all.
using CollectiveFunction = void (*)(uint32_t lanes, void** arguments, Warp& warp);
struct Rendezvous {
  bool used = false;
  uint32_t mask = 0, arrived = 0;
  const char* operation = nullptr;
  Site site{};
  void* arguments[32] = {};
  CollectiveFunction function = nullptr;
  bool whole_warp = false;
};

struct WgmmaAccumulator {  // registers that wgmma owns between issue and wait, known by their address in each lane
  float* lanes[32];
  int registers, pending;
  std::vector<float> values, last_returned;
};
struct WgmmaOperation {
  int accumulator;
  WgmmaOperands operands;
  std::vector<uint16_t> a, b;  // operands as they were at issue
  Site site;
};
struct WgmmaState {
  bool fenced = false;
  std::vector<WgmmaAccumulator> accumulators;
  std::vector<WgmmaOperation> open;
  std::vector<std::vector<WgmmaOperation>> groups;
  uint64_t issued = 0;
};

struct Warp {
  Block* block = nullptr;
  int id = 0;
  uint32_t ready = 0, alive = 0;
  Rendezvous rendezvous[6];
  int elected = 0;
  WgmmaState wgmma;
  int registers = 0;  // setmaxnreg
};

struct NamedBarrier {
  int threads = 0, arrived = 0;  // threads 0: the whole block
  std::vector<Thread*> waiting;
  const char* operation = nullptr;
  Site site{}, warp_site[kMaxWarps] = {};
  uint32_t warps = 0;
  BlockReduce reduce = BlockReduce::kNone;
  int count = 0;
  VectorClock clock;
};

struct MBarrier {
  uint32_t expected = 0;
  int pending = 0, pending_bytes = 0;
  uint32_t phase = 0;
  std::vector<Thread*> waiting;
  VectorClock clock, completed;
};

struct Event {  // the landing of a bulk copy
  uint64_t due, order;
  std::function<void()> land;
};
struct WgmmaRecord {  // all warps of a warpgroup must issue the same sequence
  WgmmaOperands operands;
  Site site;
};

struct Block {
  const char* kernel = "";
  Site launched{};
  Index3 index{};
  Dim3 size, grid;
  uint32_t linear = 0;
  int num_threads = 0, num_warps = 0, alive = 0;
  Thread* threads = nullptr;
  Warp warps[kMaxWarps];
  Thread launcher;  // the context that started the block

  uint32_t ready_warps = 0;
  int current_warp = 0, current_lane = -1;
  Random random;
  bool shuffled = false;  // random order
  AsyncTiming async = AsyncTiming::kLate;

  NamedBarrier barriers[16];
  std::unordered_map<uint32_t, MBarrier> mbarriers;
  std::vector<Event> events;
  uint64_t steps = 0, next_due = ~0ull, events_posted = 0;
  std::vector<WgmmaRecord> wgmma_records[kMaxWarps / 4];

  unsigned char* shared = nullptr;
  uint32_t shared_bytes = 0;

  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
  std::string error;
  bool failed = false;
  Statistics statistics;
};

inline Thread* current() { return static_cast<Thread*>(current_view); }
std::string place(Site site);  // "rms_norm.cu:31"
// LIGHTMOE_SIM_LAUNCHES=FILE gets a line for every kernel of this process, with the most dynamic shared memory it was launched with.
void record_launch(const char* kernel, const Grid& grid);
std::string kernel_name(const char* pretty);  // out of launch's __PRETTY_FUNCTION__
std::string describe(const Block& block);     // "kernel K launched at F:L, block (0,0,0)"
inline bool same_place(Site a, Site b) { return a.line == b.line && std::string_view(a.file) == b.file; }

// Ends the block: the report names what happened, kernel, block, thread, file and line.
[[noreturn]] void raise_fault(const char* kind, Site site, const std::string& message);
template <class... Args>
[[noreturn]] void fault(const char* kind, Site site, fmt::format_string<Args...> format, Args&&... args) {
  raise_fault(kind, site, fmt::format(format, std::forward<Args>(args)...));
}
struct Fault {};  // what raise_fault throws through a fiber

// scheduler.cpp
void start_block(Block& block);  // runs it to its end or to a fault
void block_on(const char* operation, Site site);
void make_ready(Thread* thread);
void mark_ready(Warp& warp, uint32_t lanes);
void reschedule(Thread* from);
void post_event(Block& block, uint64_t delay, std::function<void()> land);

// warp.cpp, barrier.cpp
void rendezvous(uint32_t mask, const char* operation, Site site, void* argument, CollectiveFunction function,
                bool whole_warp);
void leave_warp(Thread* thread);  // a thread has ended: its warp's collectives may complete, or are in error
void leave_barriers(Thread* thread);

// memory.cpp
uint32_t shared_offset(const Block& block, const void* p, size_t bytes, const char* what, Site site);

// mbarrier.cpp
MBarrier& find_mbarrier(uint64_t* barrier, const char* what, Site site);
void complete_phase_if_due(MBarrier& barrier);

// copy.cpp, wgmma.cpp
void check_copies_at_thread_end(const Thread& thread);
void check_wgmma_at_thread_end(const Thread& thread);
std::string fault_at_block_end(const Block& block);  // empty: none

}  // namespace lightmoe::simulator
