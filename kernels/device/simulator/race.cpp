// Race detector: happens-before by one vector clock a simulated thread. Barriers, sync_warp and mbarriers order memory; shuffles and
// votes do not. Finds races in shared and global memory (between blocks too), reads of what nobody wrote, accesses out of bounds, use of
// copies in flight, and stores that wgmma reads without a fence between the proxies.
// Limits: of more than two readers of a byte two are remembered; bulk copies share one clock; fences and flags between blocks order
// nothing here (a legal publication would be reported).
#ifdef LIGHTMOE_RACE

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels/device/simulator/race_shadow.h"

namespace lightmoe::simulator::race {
namespace {

Block* running = nullptr;
int num_clocks = 0;                    // threads of the block, and one of the copy engine
std::vector<uint32_t> clocks, fenced;  // of each thread: its vector clock; its clock at its last proxy fence
uint32_t engine_clock = 0;
uint32_t next_block = 1, first_block = 1;  // blocks of all launches have numbers of their own

uint32_t* clock_of(int thread) { return &clocks[static_cast<size_t>(thread) * static_cast<size_t>(num_clocks)]; }
uint32_t own_clock(int thread) { return clock_of(thread)[thread]; }
uint32_t this_block() { return first_block + running->linear; }
size_t size(int n) { return static_cast<size_t>(n); }

// Did the event (block, thread, clock) happen before now, as `seen` knows it? Blocks of one launch are never ordered.
bool ordered(uint32_t block, int thread, uint32_t clock, const uint32_t* seen) {
  return block == this_block() ? clock <= seen[thread] : block < first_block;
}

struct Access {
  Thread* thread;
  const void* address;
  bool shared, write, atomic;
  uint32_t place;
};

void report(const char* kind, const Access& a, uint32_t other_place = 0, int other_thread = 0,
            uint32_t other_block = 0) {
  add_report({kind, a.thread, a.address, a.place, other_place, other_thread,
              other_block >= first_block ? other_block - first_block : 0});
}

bool write_is_ordered(const Cell& cell, const Access& a) {
  if (cell.write_clock == 0 || (a.atomic && (cell.flags & kAtomicWrite) != 0)) return true;
  if (cell.write_block == this_block() && cell.writer == a.thread->linear) return true;
  return ordered(cell.write_block, cell.writer, cell.write_clock, clock_of(a.thread->linear));
}

void check_read(Cell& cell, const Access& a) {
  if ((cell.flags & kInitialised) == 0) {
    report("uninitialised read", a);
  } else if (!write_is_ordered(cell, a)) {
    report("data race: read after write", a, cell.write_place, cell.writer, cell.write_block);
  }
  const bool other_block_of_launch = cell.read_block >= first_block && cell.read_block != this_block() && !a.shared;
  if (other_block_of_launch) return;  // that reader is remembered: it is never ordered with this block's writes
  if (cell.read_block != this_block()) {
    cell.read_block = this_block();
    cell.read_clock[0] = cell.read_clock[1] = 0;
    cell.flags &= static_cast<uint8_t>(~kAtomicReads);
  }
  if (!a.atomic) {
    cell.flags &= static_cast<uint8_t>(~kAtomicReads);
  } else if (cell.read_clock[0] == 0) {
    cell.flags |= kAtomicReads;
  }
  const uint32_t* seen = clock_of(a.thread->linear);
  int slot = static_cast<int>((a.place + static_cast<uint32_t>(a.thread->linear)) & 1);
  for (int i = 1; i >= 0; --i) {
    const bool replaceable =
        cell.read_clock[i] == 0 || cell.reader[i] == a.thread->linear || cell.read_clock[i] <= seen[cell.reader[i]];
    if (replaceable) slot = i;
  }
  cell.read_clock[slot] = seen[a.thread->linear];
  cell.reader[slot] = static_cast<uint16_t>(a.thread->linear);
  cell.read_place = a.place;
}

void check_write(const Cell& cell, const Access& a) {
  if (cell.wgmma_reads != 0) {
    report("async race: write to an operand that wgmma still reads", a, cell.read_place, cell.reader[0],
           cell.read_block);
  }
  if (!write_is_ordered(cell, a)) {
    report("data race: write after write", a, cell.write_place, cell.writer, cell.write_block);
    return;
  }
  if (cell.read_block == 0 || (a.atomic && (cell.flags & kAtomicReads) != 0)) return;
  for (int i = 0; i < 2; ++i) {
    if (cell.read_clock[i] == 0 || (cell.read_block == this_block() && cell.reader[i] == a.thread->linear)) continue;
    if (ordered(cell.read_block, cell.reader[i], cell.read_clock[i], clock_of(a.thread->linear))) continue;
    report("data race: write after read", a, cell.read_place, cell.reader[i], cell.read_block);
    return;
  }
}

void record_write(Cell& cell, uint32_t clock, int writer, uint32_t place, uint8_t flags) {
  cell.write_clock = clock;
  cell.write_block = this_block();
  cell.writer = static_cast<uint16_t>(writer);
  cell.write_place = place;
  cell.read_clock[0] = cell.read_clock[1] = cell.read_block = 0;
  cell.flags = static_cast<uint8_t>((cell.flags & kAllocated) | kInitialised | flags);
}

void check_cell(Cell& cell, const Access& a) {
  if ((cell.flags & kAllocated) == 0) return report(a.shared ? "shared out of bounds" : "global out of bounds", a);
  if ((cell.flags & kInFlight) != 0) {
    return report(a.write ? "async race: write to the destination of a copy in flight"
                          : "async race: read of a copy that was not waited for",
                  a, cell.write_place, cell.writer, cell.write_block);
  }
  a.write ? check_write(cell, a) : check_read(cell, a);
}

// f(cell, address, shared) of every byte; false if there is no shadow of this memory. What f makes of a cell is a function of the cell
// alone, reports aside: the bytes of one access, mostly all alike, cost one call.
template <class F>
bool for_cells(const void* p, size_t bytes, F&& f) {
  static_assert(std::has_unique_object_representations_v<Cell>);
  const Where where = find(p);
  if (where.cell == nullptr) return false;
  const bool alike = bytes > 1 && std::memcmp(where.cell, where.cell + 1, (bytes - 1) * sizeof(Cell)) == 0;
  const uint64_t reports = num_reports();
  for (size_t i = 0; i < bytes; ++i) {
    f(where.cell[i], static_cast<const char*>(p) + i, where.shared);
    if (alike && num_reports() == reports) {
      std::fill_n(where.cell + 1, bytes - 1, where.cell[0]);
      break;
    }
  }
  return true;
}

bool check_range(Thread* thread, const void* p, size_t bytes, bool write, bool atomic, uint32_t place) {
  return for_cells(p, bytes, [&](Cell& cell, const void* address, bool shared) {
    check_cell(cell, {thread, address, shared, write, atomic, place});
    const bool in_bounds = (cell.flags & kAllocated) != 0 && (cell.flags & kInFlight) == 0;
    if (!write || !in_bounds) return;
    const int flags = kOrdinaryStore | (atomic ? kAtomicWrite : 0);
    record_write(cell, own_clock(thread->linear), thread->linear, place, static_cast<uint8_t>(flags));
  });
}

// What every lane of the warp has seen: wgmma reads for all of them.
std::vector<uint32_t> seen_by_all_lanes(const Warp& warp) {
  const uint32_t* first = clock_of(warp.id * 32);
  std::vector<uint32_t> seen(first, first + num_clocks);
  for (int lane = 1; lane < 32; ++lane) {
    const uint32_t* other = clock_of(warp.id * 32 + lane);
    for (int i = 0; i < num_clocks; ++i) seen[size(i)] = std::min(seen[size(i)], other[i]);
  }
  return seen;
}

}  // namespace

Block* block_of_race() { return running; }

void launch_begin(uint32_t num_blocks) {
  first_block = next_block;
  next_block += num_blocks;
}

void block_begin(Block& block) {
  running = &block;
  num_clocks = block.num_threads + 1;
  engine_clock = 0;
  clocks.assign(size(block.num_threads) * size(num_clocks), 0);
  for (int i = 0; i < block.num_threads; ++i) clock_of(i)[i] = 1;
  fenced.assign(size(num_clocks), 0);
  reset_shared(block.shared_bytes);
}

void release(Thread* thread, VectorClock& into) {
  into.resize(size(num_clocks), 0);
  uint32_t* own = clock_of(thread->linear);
  for (int i = 0; i < num_clocks; ++i) into[size(i)] = std::max(into[size(i)], own[i]);
  ++own[thread->linear];
}

void acquire(Thread* thread, const VectorClock& from) {
  if (from.size() != size(num_clocks)) return;
  uint32_t* own = clock_of(thread->linear);
  for (int i = 0; i < num_clocks; ++i) own[i] = std::max(own[i], from[size(i)]);
}

void sync_warp(Warp& warp, uint32_t lanes) {
  VectorClock common;
  Thread* threads = &warp.block->threads[warp.id * 32];
  for (int lane = 0; lane < 32; ++lane) {
    if ((lanes >> lane & 1) != 0) release(threads + lane, common);
  }
  for (int lane = 0; lane < 32; ++lane) {
    if ((lanes >> lane & 1) != 0) acquire(threads + lane, common);
  }
}

void proxy_fence(Thread* thread) { fenced[size(thread->linear)] = clock_of(thread->linear)[thread->linear]++; }

void access(Thread* thread, const void* p, size_t bytes, bool write, bool atomic, Site site) {
  check_range(thread, p, bytes, write, atomic, place_of(site));
}

// By compiled code: every load and store of a kernel.
void access_at(Thread* thread, const void* p, size_t bytes, bool write, bool atomic, uint32_t place) {
  if (running == nullptr || !check_range(thread, p, bytes, write, atomic, place)) return;
  if (running->shuffled && running->random.below(1u << 20) < options().preempt * (1u << 20)) yield();
}

void copy_begin(Thread* thread, const void* to, size_t bytes, Site site) {
  const uint32_t place = place_of(site);
  for_cells(to, bytes, [&](Cell& cell, const void* address, bool shared) {
    check_cell(cell, {thread, address, shared, true, false, place});
    cell.flags |= kInFlight;
    cell.write_place = place;
    cell.writer = static_cast<uint16_t>(thread->linear);
    cell.write_block = this_block();
  });
}

void copy_end(Thread* thread, const void* to, size_t bytes, Site site) {
  const uint32_t place = place_of(site);
  for_cells(to, bytes, [&](Cell& cell, const void*, bool) {
    record_write(cell, own_clock(thread->linear), thread->linear, place, kOrdinaryStore);
  });
}

void bulk_copy_end(Block& block, const void* to, size_t bytes, Site site, VectorClock& into) {
  const uint32_t place = place_of(site);
  ++engine_clock;
  for_cells(to, bytes,
            [&](Cell& cell, const void*, bool) { record_write(cell, engine_clock, block.num_threads, place, 0); });
  into.resize(size(num_clocks), 0);
  into[size(block.num_threads)] = engine_clock;
}

void wgmma_read_begin(Warp& warp, const void* p, size_t bytes, Site site) {
  Thread* thread = &warp.block->threads[warp.id * 32];
  const uint32_t place = place_of(site);
  // The clocks do not change within one instruction.
  static std::vector<uint32_t> seen;
  static std::pair<uint64_t, int> instruction{~0ull, -1};
  const std::pair<uint64_t, int> now{warp.block->statistics.wgmma + (uint64_t{this_block()} << 32), warp.id};
  if (now != instruction || seen.size() != size(num_clocks)) seen = seen_by_all_lanes(warp);
  instruction = now;
  for_cells(p, bytes, [&](Cell& cell, const void* address, bool shared) {
    const Access a{thread, address, shared, false, false, place};
    const int writer = cell.writer;
    if ((cell.flags & kInFlight) != 0) {
      report("async race: wgmma reads a copy that was not waited for", a, cell.write_place, writer, cell.write_block);
    } else if ((cell.flags & kInitialised) == 0) {
      report("uninitialised read by wgmma", a);
    } else if (cell.write_clock != 0 && !ordered(cell.write_block, writer, cell.write_clock, seen.data())) {
      report("data race: wgmma read after write", a, cell.write_place, writer, cell.write_block);
    } else if ((cell.flags & kOrdinaryStore) != 0 && writer < running->num_threads &&
               fenced[size(writer)] < cell.write_clock) {
      report("missing fence_proxy_async before wgmma reads ordinary stores", a, cell.write_place, writer,
             cell.write_block);
    }
    ++cell.wgmma_reads;
    cell.read_place = place;
  });
}

void wgmma_read_end(Warp& warp, const void* p, size_t bytes, Site site) {
  const int reader = warp.id * 32;
  const uint32_t place = place_of(site);
  for_cells(p, bytes, [&](Cell& cell, const void*, bool) {
    if (cell.wgmma_reads > 0) --cell.wgmma_reads;
    const int slot = cell.read_clock[0] != 0 && cell.reader[0] != reader ? 1 : 0;
    cell.read_block = this_block();
    cell.read_clock[slot] = own_clock(reader);
    cell.reader[slot] = static_cast<uint16_t>(reader);
    cell.read_place = place;
  });
}

void wgmma_done(Warp& warp) {
  const int first = warp.id * 32;
  for (int lane = 1; lane < 32; ++lane) clock_of(first + lane)[first] = own_clock(first);
  ++clock_of(first)[first];
}

}  // namespace lightmoe::simulator::race

#endif
