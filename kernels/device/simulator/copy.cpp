// cp.async: 4 to 16 bytes from global to shared memory. The destination is poisoned at issue and filled when the thread waits.
#include <cstring>

#include "kernels/device/simulator/race.h"

namespace lightmoe::simulator {
namespace {

void finish(Thread* thread, const std::vector<AsyncCopy>& group) {
  for (const AsyncCopy& copy : group) {
    const auto source_bytes = static_cast<size_t>(copy.source_bytes), bytes = static_cast<size_t>(copy.bytes);
    if (source_bytes != 0 && std::memcmp(copy.data, copy.from, source_bytes) != 0) {
      fault("async race", copy.site, "cp.async: the source changed before the copy was waited for");
    }
    std::memcpy(copy.to, copy.data, source_bytes);
    std::memset(copy.to + source_bytes, 0, bytes - source_bytes);
    race::copy_end(thread, copy.to, bytes, copy.site);
  }
}

}  // namespace

void cp_async(void* shared, const void* global, int bytes, int source_bytes, Site site) {
  Thread* thread = current();
  Block& block = *thread->block;
  const auto size = static_cast<size_t>(bytes);
  if (reinterpret_cast<uintptr_t>(shared) % size != 0 ||
      (source_bytes != 0 && reinterpret_cast<uintptr_t>(global) % size != 0)) {
    fault("alignment", site, "cp.async: an address is no multiple of {}", bytes);
  }
  if (source_bytes < 0 || source_bytes > bytes) fault("async", site, "cp.async: {} of {} bytes", source_bytes, bytes);
  shared_offset(block, shared, size, "cp.async destination", site);
  AsyncCopy copy{
      static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, source_bytes, {}, site};
  if (source_bytes != 0) {
    race::access(thread, global, static_cast<size_t>(source_bytes), false, false, site);
    std::memcpy(copy.data, global, static_cast<size_t>(source_bytes));
  }
  race::copy_begin(thread, shared, size, site);
  std::memset(shared, 0xff, size);
  thread->open_copies.push_back(copy);
  ++block.statistics.cp_async;
}

void cp_async_commit(Site) {
  Thread* thread = current();
  thread->copy_groups.push_back(std::move(thread->open_copies));
  thread->open_copies.clear();
}

void cp_async_wait(int groups_left, Site) {
  Thread* thread = current();
  std::vector<std::vector<AsyncCopy>>& groups = thread->copy_groups;
  while (groups.size() > static_cast<size_t>(groups_left)) {
    finish(thread, groups.front());
    groups.erase(groups.begin());
  }
}

void check_copies_at_thread_end(const Thread& thread) {
  constexpr const char* kText = "the thread ends with a cp.async that was never waited for";
  if (!thread.open_copies.empty()) raise_fault("async", thread.open_copies[0].site, kText);
  for (const std::vector<AsyncCopy>& group : thread.copy_groups) {
    if (!group.empty()) raise_fault("async", group[0].site, kText);
  }
}

}  // namespace lightmoe::simulator
