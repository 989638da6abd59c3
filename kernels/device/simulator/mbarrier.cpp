// mbarriers: a phase is complete when no arrival and no byte is outstanding.
#include "kernels/device/simulator/race.h"

namespace lightmoe::simulator {
namespace {

constexpr uint32_t kMaxCount = (1u << 20) - 1;

uint32_t barrier_address(uint64_t* barrier, const char* what, Site site) {
  const uint32_t address = shared_offset(*current()->block, barrier, 8, what, site);
  if (address % 8 != 0) fault("alignment", site, "{}: the barrier's address is no multiple of 8", what);
  return address;
}

}  // namespace

MBarrier& find_mbarrier(uint64_t* barrier, const char* what, Site site) {
  Block& block = *current()->block;
  const auto found = block.mbarriers.find(barrier_address(barrier, what, site));
  if (found == block.mbarriers.end()) fault("mbarrier", site, "{} on a barrier that has not been initialised", what);
  return found->second;
}

void complete_phase_if_due(MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.pending_bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = static_cast<int>(barrier.expected);
  barrier.completed = barrier.clock;
  for (Thread* thread : barrier.waiting) make_ready(thread);
  barrier.waiting.clear();
}

void mbarrier_init(uint64_t* barrier, uint32_t count, Site site) {
  const uint32_t address = barrier_address(barrier, "mbarrier.init", site);
  if (count == 0 || count > kMaxCount) fault("mbarrier", site, "mbarrier.init: count {}", count);
  MBarrier fresh;
  fresh.expected = count;
  fresh.pending = static_cast<int>(count);
  race::access(current(), barrier, 8, true, false, site);
  if (!current()->block->mbarriers.emplace(address, fresh).second) {
    fault("mbarrier", site, "mbarrier.init on a live barrier (no mbarrier.inval before)");
  }
}

void mbarrier_invalidate(uint64_t* barrier, Site site) {
  find_mbarrier(barrier, "mbarrier.inval", site);
  current()->block->mbarriers.erase(barrier_address(barrier, "mbarrier.inval", site));
}

void mbarrier_arrive(uint64_t* barrier, uint32_t count, Site site) {
  MBarrier& b = find_mbarrier(barrier, "mbarrier.arrive", site);
  race::access(current(), barrier, 8, true, true, site);
  race::release(current(), b.clock);
  b.pending -= static_cast<int>(count);
  if (b.pending < 0) fault("mbarrier", site, "more arrivals in a phase than the {} the barrier expects", b.expected);
  complete_phase_if_due(b);
}

void mbarrier_expect_bytes(uint64_t* barrier, uint32_t bytes, Site site) {
  MBarrier& b = find_mbarrier(barrier, "mbarrier.expect_tx", site);
  b.pending_bytes += static_cast<int>(bytes);
  if (b.pending_bytes > static_cast<int>(kMaxCount)) fault("mbarrier", site, "more than 2^20-1 bytes are expected");
}

namespace {

const char* wait_name(uint32_t parity) {
  return (parity & 1) != 0 ? "mbarrier wait (parity 1)" : "mbarrier wait (parity 0)";
}

// A wait for a phase that is complete already returns at once; the barrier tells only the last two phases apart.
bool phase_is_complete(const MBarrier& barrier, uint32_t parity) { return barrier.phase != (parity & 1); }

void wait_for_phase(uint64_t* barrier, uint32_t parity, Site site) {
  MBarrier& b = find_mbarrier(barrier, "mbarrier.try_wait", site);
  if (phase_is_complete(b, parity)) return;
  b.waiting.push_back(current());
  block_on(wait_name(parity), site);
}

void acquire_completed(uint64_t* barrier, Site site) {
  const Block& block = *current()->block;
  const auto found = block.mbarriers.find(barrier_address(barrier, "mbarrier", site));
  if (found != block.mbarriers.end()) race::acquire(current(), found->second.completed);
}

}  // namespace

// May say "not yet", as the hardware may; when it would have to wait for good it waits like mbarrier_wait.
bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity, Site site) {
  Thread* thread = current();
  race::access(thread, barrier, 8, false, true, site);
  Block& block = *thread->block;
  if (!phase_is_complete(find_mbarrier(barrier, "mbarrier.try_wait", site), parity) && block.shuffled &&
      block.random.below(4) == 0) {
    yield();
    if (!phase_is_complete(find_mbarrier(barrier, "mbarrier.try_wait", site), parity)) return false;
  }
  wait_for_phase(barrier, parity, site);
  acquire_completed(barrier, site);
  return true;
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site) {
  race::access(current(), barrier, 8, false, true, site);
  wait_for_phase(barrier, parity, site);
  acquire_completed(barrier, site);
}

void fence_proxy_async(Site) { race::proxy_fence(current()); }

}  // namespace lightmoe::simulator
