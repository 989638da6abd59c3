// Blocks of a grid over the program's threads; the shared memory and the fibers that each OS thread keeps from launch to launch.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <numeric>

#include "kernels/device/simulator/guard.h"
#include "kernels/device/simulator/race.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

#ifdef LIGHTMOE_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace lightmoe::simulator {
namespace {

constexpr size_t kArenaAlignment = 65536;
constexpr int64_t kThreadsPerWorker =
    4096;  // a launch smaller than this is over before a second OS thread has woken up
#ifdef LIGHTMOE_ASAN
constexpr size_t kDefaultStackBytes = 256 << 10;
#else
constexpr size_t kDefaultStackBytes = 64 << 10;
#endif

// What one OS thread needs to run a block.
class Worker {
 public:
  Worker() : threads_(kMaxThreads) {  // never moved: parked fibers hold pointers into it
    const size_t bytes = kSharedBytes + 3 * kArenaAlignment;
    arena_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(arena_ != MAP_FAILED, ErrorKind::kMemory, "sim: no memory for a block's shared memory");
    const uintptr_t start = (reinterpret_cast<uintptr_t>(arena_) + kArenaAlignment) & ~(kArenaAlignment - 1);
    block_.shared = reinterpret_cast<unsigned char*>(start);
    block_.threads = threads_.data();
  }
  ~Worker() {
    drop_stacks();
    mark_shared(kSharedBytes);
    munmap(arena_, kSharedBytes + 3 * kArenaAlignment);
  }
  Block& block() { return block_; }
  void run(const char* kernel, const Grid& grid, uint64_t linear, uint64_t seed);

  void (*entry)(void*) = nullptr;
  void* argument = nullptr;

 private:
  void provide_stacks(int count);
  void drop_stacks();
  void mark_shared(uint32_t accessible_bytes);
  void reset_warps();
  void reset_threads();

  Block block_;
  std::vector<Thread> threads_;
  std::vector<char*> stacks_;
  size_t stack_bytes_ = 0;
  void* arena_ = nullptr;
};

void Worker::provide_stacks(int count) {
  if (stack_bytes_ == 0) stack_bytes_ = options().stack_bytes != 0 ? options().stack_bytes : kDefaultStackBytes;
  for (int i = static_cast<int>(stacks_.size()); i < count; ++i) {
    stacks_.push_back(map_stack(stack_bytes_));
    threads_[static_cast<size_t>(i)].fiber.stack = stacks_.back();
    threads_[static_cast<size_t>(i)].fiber.stack_bytes = stack_bytes_;
  }
}

void Worker::drop_stacks() {
  for (char* stack : stacks_) unmap_stack(stack, stack_bytes_);
  stacks_.clear();
  for (Thread& thread : threads_) thread.started = false;
}

// Shared memory beyond what the launch asked for is out of bounds.
void Worker::mark_shared(uint32_t accessible_bytes) {
#ifdef LIGHTMOE_ASAN
  ASAN_UNPOISON_MEMORY_REGION(block_.shared, accessible_bytes);
  ASAN_POISON_MEMORY_REGION(block_.shared + accessible_bytes, kSharedBytes + 64 - accessible_bytes);
#endif
  (void)accessible_bytes;
}

void Worker::reset_warps() {
  Block& b = block_;
  for (int w = 0; w < b.num_warps; ++w) {
    const int lanes = std::min(32, b.num_threads - 32 * w);
    Warp& warp = b.warps[w];
    warp = Warp{};
    warp.block = &b;
    warp.id = w;
    warp.alive = lanes == 32 ? kFullWarp : (1u << lanes) - 1;
    warp.elected = b.shuffled ? static_cast<int>(b.random.below(32)) : 0;
    mark_ready(warp, warp.alive);
  }
}

void Worker::reset_threads() {
  Block& b = block_;
  for (int i = 0; i < b.num_threads; ++i) {
    Thread& thread = threads_[static_cast<size_t>(i)];
    const auto u = static_cast<uint32_t>(i);
    thread.index = {u % b.size.x, u / b.size.x % b.size.y, u / b.size.x / b.size.y};
    thread.lane = i & 31;
    thread.linear = i;
    thread.block_index = &b.index;
    thread.block_size = &b.size;
    thread.grid_size = &b.grid;
    thread.block = &b;
    thread.warp = &b.warps[i / 32];
    thread.waits_in = nullptr;
    thread.done = false;
    thread.open_copies.clear();
    thread.copy_groups.clear();
  }
}

void Worker::run(const char* kernel, const Grid& grid, uint64_t linear, uint64_t seed) {
  Block& b = block_;
  b.kernel = kernel;
  b.launched = grid.launched;
  b.size = grid.threads;
  b.grid = grid.blocks;
  b.linear = static_cast<uint32_t>(linear);
  b.index = {static_cast<uint32_t>(linear % grid.blocks.x),
             static_cast<uint32_t>(linear / grid.blocks.x % grid.blocks.y),
             static_cast<uint32_t>(linear / grid.blocks.x / grid.blocks.y)};
  b.num_threads = b.alive = static_cast<int>(grid.threads.x * grid.threads.y * grid.threads.z);
  b.num_warps = (b.num_threads + 31) / 32;
  b.entry = entry;
  b.argument = argument;
  b.failed = false;
  b.error.clear();
  for (NamedBarrier& barrier : b.barriers) barrier = NamedBarrier{};
  for (auto& records : b.wgmma_records) records.clear();
  b.mbarriers.clear();
  b.events.clear();
  b.steps = 0;
  b.next_due = ~0ull;
  b.ready_warps = 0;
  b.current_warp = 0;
  b.current_lane = -1;
  b.shuffled = seed != 0;
  b.random.state = ((seed + 0x9E3779B97F4A7C15ull) * (linear * 2 + 1)) | 1;
  b.random.next();
  b.async = options().async != AsyncTiming::kAuto ? options().async
            : b.shuffled                          ? AsyncTiming::kRandom
                                                  : AsyncTiming::kLate;
  b.shared_bytes = static_cast<uint32_t>(grid.shared_bytes);
  mark_shared(b.shared_bytes);
  std::memset(b.shared, 0xff, b.shared_bytes);  // NaN where a kernel reads what it has not written
  provide_stacks(b.num_threads);
  reset_warps();
  reset_threads();
  race::block_begin(b);
  start_block(b);
  if (b.failed) drop_stacks();  // the other fibers are abandoned in mid-flight
}

void check_launch(const char* kernel, const Grid& grid) {
  const uint64_t threads = uint64_t{grid.threads.x} * grid.threads.y * grid.threads.z;
  require(current_view == nullptr, "sim: a kernel launches {}", kernel_name(kernel));
  check(threads > 0 && threads <= kMaxThreads && grid.threads.z <= 64, ErrorKind::kDevice,
        "sim: kernel {}: block of ({},{},{}) threads, a block has 1 to 1024; launched at {}", kernel_name(kernel),
        grid.threads.x, grid.threads.y, grid.threads.z, place(grid.launched));
  check(grid.blocks.x <= 2147483647u && grid.blocks.y <= 65535 && grid.blocks.z <= 65535, ErrorKind::kDevice,
        "sim: kernel {}: grid of ({},{},{}) blocks, limits are 2147483647, 65535, 65535; launched at {}",
        kernel_name(kernel), grid.blocks.x, grid.blocks.y, grid.blocks.z, place(grid.launched));
  check(grid.shared_bytes <= kSharedBytes, ErrorKind::kDevice,
        "sim: kernel {}: {} bytes of shared memory, a block has {}; launched at {}", kernel_name(kernel),
        grid.shared_bytes, kSharedBytes, place(grid.launched));
}

// Random order of blocks: an affine permutation of their numbers.
struct BlockOrder {
  uint64_t count, multiplier = 1, offset = 0;
  BlockOrder(uint64_t blocks, uint64_t seed) : count(blocks) {
    if (seed == 0 || blocks < 3) return;
    Random random{seed | 1};
    do multiplier = random.next() % blocks;
    while (std::gcd(multiplier, blocks) != 1);
    offset = random.next() % blocks;
  }
  uint64_t operator()(uint64_t i) const {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * multiplier + offset) % count);
  }
};

std::atomic<uint64_t> num_launches{0};
std::mutex launch_mutex;

}  // namespace

void launch(const char* kernel, const Grid& grid, void (*entry)(void*), void* argument) {
  check_launch(kernel, grid);
  record_launch(kernel, grid);
  const OpenDeviceMemory open;
  const uint64_t blocks = uint64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
  const uint64_t number = num_launches++;
  const uint64_t seed = options().seed != 0 ? options().seed * 0x9E3779B97F4A7C15ull + number * 77 + 1 : 0;
  const BlockOrder order(blocks, seed);
  race::launch_begin(static_cast<uint32_t>(blocks));
  std::atomic<uint64_t> next{0};
  std::string error;
  const auto work = [&](int64_t) {
    static thread_local Worker worker;
    worker.entry = entry;
    worker.argument = argument;
    worker.block().statistics = {};
    std::string failure;
    for (uint64_t i; failure.empty() && (i = next.fetch_add(1)) < blocks;) {
      worker.run(kernel, grid, order(i), seed);
      failure = worker.block().error;
    }
    const std::lock_guard<std::mutex> lock(launch_mutex);
    if (!failure.empty()) next = blocks;
    if (error.empty()) error = failure;
    statistics().add(worker.block().statistics);
  };
  const int64_t simulated = static_cast<int64_t>(blocks) * grid.threads.x * grid.threads.y * grid.threads.z;
  const int64_t wanted = std::min<int64_t>(static_cast<int64_t>(blocks), simulated / kThreadsPerWorker + 1);
  const int64_t workers = race::kEnabled ? 1 : std::min<int64_t>(num_threads(), wanted);
  parallel_items(workers, work);
  const std::string races = race::take_reports();
  if (!races.empty()) error += (error.empty() ? "" : "; ") + races;
  check(error.empty(), ErrorKind::kDevice, "{}", error);
}

void* shared_memory(size_t bytes, Site site) {
  const Block& block = *current()->block;
  if (bytes > block.shared_bytes) {
    fault("shared memory", site, "{} bytes are used, the launch gives {}", bytes, block.shared_bytes);
  }
  return block.shared;
}

uint32_t shared_offset(const Block& block, const void* p, size_t bytes, const char* what, Site site) {
  const auto* address = static_cast<const unsigned char*>(p);
  if (address < block.shared || address + bytes > block.shared + kSharedBytes) {
    fault("shared address", site, "{}: {} is not in shared memory", what, p);
  }
  const auto offset = static_cast<uint32_t>(address - block.shared);
  if (offset + bytes > block.shared_bytes) {
    fault("shared out of bounds", site, "{}: bytes {} to {}, the block has {}", what, offset, offset + bytes,
          block.shared_bytes);
  }
  return offset + kSharedBase;
}

void check_alignment(const void* p, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fault("alignment", site, "{} is not a multiple of {}", p, bytes);
}

uint32_t shared_address(const void* p, Site site) {
  return shared_offset(*current()->block, p, 0, "address of shared memory", site);
}

}  // namespace lightmoe::simulator
