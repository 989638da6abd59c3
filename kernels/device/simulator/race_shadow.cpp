// Memory of the simulated device in the race build, its shadow, and the texts of reports.
#ifdef LIGHTMOE_RACE

#include "kernels/device/simulator/race_shadow.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

#include "runtime/error.h"
#include "runtime/memory.h"

extern "C" char __executable_start;

namespace lightmoe::simulator::race {
namespace {

constexpr size_t kHeapBytes = size_t{1} << 30;  // address space; small shapes only
constexpr size_t kGap = 256;                    // never allocated, between two allocations
constexpr size_t kMaxReports = 20;

void* reserve(size_t bytes) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  check(start != MAP_FAILED, ErrorKind::kMemory, "sim, race build: {} bytes of address space cannot be reserved",
        bytes);
  return start;
}

class Heap {
 public:
  Heap()
      : start_(static_cast<unsigned char*>(reserve(kHeapBytes))),
        cells_(static_cast<Cell*>(reserve(kHeapBytes * sizeof(Cell)))) {}

  void* allocate(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t rounded = (bytes + kGap - 1) / kGap * kGap;
    std::vector<size_t>& free = free_[rounded];
    size_t offset = top_ + kGap;
    if (!free.empty()) {
      offset = free.back();
      free.pop_back();
    } else {
      if (offset + rounded + kGap > kHeapBytes) return nullptr;
      top_ = offset + rounded;
    }
    std::memset(cells_ + offset, 0, bytes * sizeof(Cell));
    set_flags(start_ + offset, bytes, kAllocated);
    live_[start_ + offset] = bytes;
    return start_ + offset;
  }
  void release(void* data, size_t bytes) {
    if (data == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    set_flags(data, bytes, 0);
    live_.erase(static_cast<unsigned char*>(data));
    free_[(bytes + kGap - 1) / kGap * kGap].push_back(static_cast<size_t>(static_cast<unsigned char*>(data) - start_));
  }
  // By the host, between launches: ordered before everything that follows.
  void set_flags(const void* data, size_t bytes, uint8_t flags) {
    if (!holds(data)) return;
    Cell* cell = cell_of(data);
    for (size_t i = 0; i < bytes; ++i) {
      cell[i].flags = flags;
      cell[i].write_clock = cell[i].read_block = 0;
    }
  }
  bool holds(const void* p) const { return p >= start_ && p < start_ + kHeapBytes; }
  Cell* cell_of(const void* p) const { return cells_ + (static_cast<const unsigned char*>(p) - start_); }
  std::string text(const void* p) const {
    auto next = live_.upper_bound(static_cast<unsigned char*>(const_cast<void*>(p)));
    if (next == live_.begin()) return "global memory";
    --next;
    return fmt::format("global memory, byte {} of an allocation of {}",
                       static_cast<const unsigned char*>(p) - next->first, next->second);
  }

 private:
  unsigned char* start_;
  Cell* cells_;
  size_t top_ = 0;
  std::map<size_t, std::vector<size_t>> free_;  // offsets by rounded size
  std::map<unsigned char*, size_t> live_;
  std::mutex mutex_;
};

Heap& heap() {
  static Heap* const instance = new Heap;  // tensors may outlive everything
  return *instance;
}

// Memory filled with the poison of fresh tensors counts as uninitialised.
const bool registered = [] {
  register_device_memory(DeviceKind::kSim,
                         {.allocate = [](size_t bytes) { return heap().allocate(bytes); },
                          .release = [](void* data, size_t bytes) { heap().release(data, bytes); },
                          .copy =
                              [](void* to, const void* from, size_t bytes) {
                                std::memcpy(to, from, bytes);
                                heap().set_flags(to, bytes, kAllocated | kInitialised);
                              },
                          .fill =
                              [](void* data, int byte, size_t bytes) {
                                std::memset(data, byte, bytes);
                                heap().set_flags(data, bytes, byte == 0xff ? kAllocated : kAllocated | kInitialised);
                              }});
  return true;
}();

std::vector<Cell> shared_cells(kSharedBytes + 1);
std::vector<Site> sites;

// "vector.h:46 (rms_norm.cu:31)": the innermost line, and the kernel file's if that is another.
std::string run_addr2line(uint32_t address) {
  char executable[512] = {};
  if (readlink("/proc/self/exe", executable, sizeof executable - 1) <= 0) return "?";
  const std::string command = fmt::format("addr2line -i -e '{}' {:#x} 2>/dev/null", executable, address);
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return "?";
  std::string innermost, in_kernel;
  for (char line[1024]; std::fgets(line, sizeof line, pipe) != nullptr;) {
    line[std::strcspn(line, "\n ")] = 0;
    const char* slash = std::strrchr(line, '/');
    const std::string name = slash != nullptr ? slash + 1 : line;
    if (innermost.empty()) innermost = name;
    if (in_kernel.empty() && name.find(".cu:") != std::string::npos) in_kernel = name;
  }
  pclose(pipe);
  return in_kernel.empty() || in_kernel == innermost ? innermost : fmt::format("{} ({})", innermost, in_kernel);
}

std::set<std::string> reported;
std::vector<std::string> reports;
uint64_t num_events = 0;
size_t shared_used = 0;  // cells of shared memory beyond are zero; to touch what is not allocated makes a report

}  // namespace

uint32_t place_of(Site site) {
  for (size_t i = 0; i < sites.size(); ++i) {
    if (same_place(sites[i], site)) return 0x80000000u | static_cast<uint32_t>(i);
  }
  sites.push_back(site);
  return 0x80000000u | static_cast<uint32_t>(sites.size() - 1);
}

std::string text_of_place(uint32_t at) {
  if (at == 0) return "?";
  if ((at & 0x80000000u) != 0) return place(sites[at & 0x7fffffffu]);
  const bool relocated = reinterpret_cast<uintptr_t>(&__executable_start) > 0x10000000u;
  return run_addr2line(relocated ? at - 1
                                 : at - 1 + static_cast<uint32_t>(reinterpret_cast<uintptr_t>(&__executable_start)));
}

Where find(const void* p) {
  const Block* block = block_of_race();
  const auto* address = static_cast<const unsigned char*>(p);
  if (block != nullptr && address >= block->shared && address < block->shared + kSharedBytes) {
    return {&shared_cells[static_cast<size_t>(address - block->shared)], true};
  }
  return heap().holds(p) ? Where{heap().cell_of(p), false} : Where{};
}

std::string text_of_address(const void* p) {
  const Block* block = block_of_race();
  const auto* address = static_cast<const unsigned char*>(p);
  if (block != nullptr && address >= block->shared && address < block->shared + kSharedBytes) {
    return fmt::format("shared byte {}", address - block->shared);
  }
  return heap().text(p);
}

void reset_shared(uint32_t bytes) {
  std::memset(shared_cells.data(), 0, shared_used * sizeof(Cell));
  for (uint32_t i = 0; i < bytes; ++i) shared_cells[i].flags = kAllocated;
  shared_used = bytes;
}

uint64_t num_reports() { return num_events; }

void add_report(const Report& r) {
  ++num_events;
  shared_used = kSharedBytes + 1;
  const std::string key = fmt::format("{} {} {}", r.kind, r.place, r.other_place);
  if (!reported.insert(key).second || reports.size() >= kMaxReports) return;
  const Block& block = *r.thread->block;
  std::string text =
      fmt::format("sim: {}: {}; at {}; {}, thread {} (warp {} lane {})", r.kind, text_of_address(r.address),
                  text_of_place(r.place), describe(block), r.thread->linear, r.thread->linear / 32, r.thread->lane);
  if (r.other_place != 0) {
    const std::string who =
        r.other_thread == block.num_threads ? "the copy engine" : fmt::format("thread {}", r.other_thread);
    text += fmt::format("; earlier by {} of block {} at {}", who, r.other_block, text_of_place(r.other_place));
  }
  reports.push_back(text);
}

std::string take_reports() {
  std::string text;
  for (const std::string& report : reports) text += (text.empty() ? "" : "; ") + report;
  if (num_events > reports.size()) text += fmt::format(" ({} events in all)", num_events);
  reports.clear();
  reported.clear();
  num_events = 0;
  return text;
}

}  // namespace lightmoe::simulator::race

#endif
