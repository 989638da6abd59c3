// Barriers of a block: sync_block (barrier 0 over all threads that are alive) and PTX's named barriers with a thread count.
#include "kernels/device/simulator/race.h"

namespace lightmoe::simulator {
namespace {

bool complete(const Block& block, const NamedBarrier& barrier) {
  return barrier.arrived > 0 && barrier.arrived == (barrier.threads != 0 ? barrier.threads : block.alive);
}

void release_all(NamedBarrier& barrier) {
  const int waiting = static_cast<int>(barrier.waiting.size());
  for (Thread* thread : barrier.waiting) {
    thread->barrier_result = barrier.reduce == BlockReduce::kCount ? barrier.count
                             : barrier.reduce == BlockReduce::kAnd ? barrier.count == waiting
                                                                   : barrier.count > 0;
    race::acquire(thread, barrier.clock);
    make_ready(thread);
  }
  barrier.waiting.clear();
  barrier.arrived = barrier.count = 0;
  barrier.warps = 0;
  barrier.clock.clear();
}

// Threads of one sync_block, and lanes of one warp at any barrier, must stand at the same place.
void check_same_barrier(const NamedBarrier& barrier, int id, int threads, int warp, Site site) {
  if (barrier.threads != threads) {
    fault("barrier", site, "barrier {}: this thread says {} threads, earlier ones said {} ({})", id, threads,
          barrier.threads, place(barrier.site));
  }
  if (threads == 0 && !same_place(barrier.site, site)) {
    fault("divergent barrier", site, "threads of one block meet in different sync_block: {} and {}", place(site),
          place(barrier.site));
  }
  if ((barrier.warps >> warp & 1) != 0 && !same_place(barrier.warp_site[warp], site)) {
    fault("divergent barrier", site, "lanes of warp {} meet barrier {} at {} and {}", warp, id, place(site),
          place(barrier.warp_site[warp]));
  }
}

struct Arrival {
  int id, threads;
  const char* operation;
  bool waits;
  BlockReduce reduce = BlockReduce::kNone;
  bool predicate = false;
};

void join(const Arrival& arrival, Site site) {
  Thread* thread = current();
  Block& block = *thread->block;
  const int threads = arrival.threads, warp = thread->linear / 32;
  if (arrival.id < 0 || arrival.id > 15) fault("barrier", site, "barrier id {} is not in 0..15", arrival.id);
  if (threads % 32 != 0 || threads < 0 || threads > (block.num_threads + 31) / 32 * 32) {
    fault("barrier", site, "thread count {} of barrier {} is no multiple of 32 within the block", threads, arrival.id);
  }
  NamedBarrier& barrier = block.barriers[arrival.id];
  if (barrier.arrived == 0) {
    barrier.threads = threads;
    barrier.operation = arrival.operation;
    barrier.site = site;
    barrier.reduce = arrival.reduce;
  } else {
    check_same_barrier(barrier, arrival.id, threads, warp, site);
  }
  barrier.warps |= 1u << warp;
  barrier.warp_site[warp] = site;
  ++barrier.arrived;
  barrier.count += arrival.predicate ? 1 : 0;
  race::release(thread, barrier.clock);
  ++block.statistics.barriers;
  if (barrier.threads != 0 && barrier.arrived > barrier.threads) {
    fault("barrier", site, "barrier {}: more than {} threads arrived", arrival.id, barrier.threads);
  }
  if (arrival.waits) barrier.waiting.push_back(thread);
  if (complete(block, barrier)) {
    release_all(barrier);
  } else if (arrival.waits) {
    block_on(arrival.operation, site);
  }
}

}  // namespace

int sync_block(BlockReduce reduce, bool predicate, Site site) {
  join({.id = 0, .threads = 0, .operation = "sync_block", .waits = true, .reduce = reduce, .predicate = predicate},
       site);
  return current()->barrier_result;
}
void barrier_sync(int id, int threads, Site site) {
  join({.id = id, .threads = threads, .operation = "bar.sync", .waits = true}, site);
}
void barrier_arrive(int id, int threads, Site site) {
  if (threads == 0) fault("barrier", site, "bar.arrive needs a thread count");
  join({.id = id, .threads = threads, .operation = "bar.arrive", .waits = false}, site);
}

void leave_barriers(Thread* thread) {
  for (const NamedBarrier& barrier : thread->block->barriers) {
    if (barrier.arrived > 0 && barrier.threads == 0) {
      fault("divergent barrier", barrier.site, "thread {} ended while {} threads wait in {}", thread->linear,
            barrier.arrived, barrier.operation);
    }
  }
}

}  // namespace lightmoe::simulator
