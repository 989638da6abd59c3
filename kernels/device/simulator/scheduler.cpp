// Which fiber runs next: round robin, or seeded random; landing of asynchronous events; deadlock reports.
#include <algorithm>
#include <bit>

#include "kernels/device/simulator/internal.h"
#include "runtime/error.h"

namespace lightmoe::simulator {

constinit thread_local ThreadView* current_view = nullptr;

namespace {

uint32_t lanes_above(int lane) { return lane >= 31 ? 0u : ~0u << (lane + 1); }

int nth_bit(uint32_t bits, int n) {
  while (n-- > 0) bits &= bits - 1;
  return std::countr_zero(bits);
}

void run_due_events(Block& block) {
  for (;;) {
    const auto next = std::min_element(block.events.begin(), block.events.end(), [](const Event& a, const Event& b) {
      return a.due != b.due ? a.due < b.due : a.order < b.order;
    });
    if (next == block.events.end() || next->due > block.steps) {
      block.next_due = next == block.events.end() ? ~0ull : next->due;
      return;
    }
    const std::function<void()> land = std::move(next->land);
    block.events.erase(next);
    // NOTE: this may run on any fiber, or on one that has ended, so no fault may pass through.
    try {
      land();
    } catch (Fault&) {
      block.failed = true;
    }
  }
}

void choose_at_random(Block& block) {
  const uint64_t r = block.random.next();
  const bool stay = (block.ready_warps >> block.current_warp & 1) != 0 && (r & 7) != 0;
  if (!stay) {
    const uint64_t count = static_cast<uint64_t>(std::popcount(block.ready_warps));
    block.current_warp = nth_bit(block.ready_warps, static_cast<int>((r >> 8) % count));
  }
  const uint32_t ready = block.warps[block.current_warp].ready;
  block.current_lane = nth_bit(ready, static_cast<int>((r >> 20) % static_cast<uint64_t>(std::popcount(ready))));
}

void choose_next_in_order(Block& block) {
  uint32_t candidates = block.warps[block.current_warp].ready & lanes_above(block.current_lane);
  if (candidates == 0) {
    const uint32_t later = block.ready_warps & lanes_above(block.current_warp);
    block.current_warp = std::countr_zero(later != 0 ? later : block.ready_warps);
    candidates = block.warps[block.current_warp].ready;
  }
  block.current_lane = std::countr_zero(candidates);
}

Thread* pick(Block& block) {  // null: nothing can run
  ++block.steps;
  if (block.steps >= block.next_due) run_due_events(block);
  for (;;) {
    if (block.ready_warps != 0) {
      block.shuffled ? choose_at_random(block) : choose_next_in_order(block);
      return &block.threads[block.current_warp * 32 + block.current_lane];
    }
    if (block.events.empty() || block.alive == 0) return nullptr;
    block.steps = block.next_due;  // everybody waits for a copy: it lands
    run_due_events(block);
  }
}

std::string deadlock_text(const Block& block) {
  struct Group {
    int count = 0, first = 0;
  };
  std::map<std::string, Group> groups;
  int ended = 0;
  for (int i = 0; i < block.num_threads; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.done) {
      ++ended;
      continue;
    }
    Group& group =
        groups[fmt::format("{} at {}", thread.waits_in != nullptr ? thread.waits_in : "code", place(thread.waits_at))];
    if (group.count++ == 0) group.first = i;
  }
  std::string text = "no thread of the block can go on";
  for (const auto& [where, group] : groups) {
    text += fmt::format("; {} threads (first: thread {}) wait in {}", group.count, group.first, where);
  }
  if (ended > 0) text += fmt::format("; {} threads have ended", ended);
  return text;
}

void switch_to(Thread& from, Thread& to) {
  ++to.block->statistics.switches;
  current_view = &to;
  switch_fibers(from.fiber, to.fiber);
}

void end_thread(Thread* thread) {
  check_copies_at_thread_end(*thread);
  check_wgmma_at_thread_end(*thread);
  Warp& warp = *thread->warp;
  const uint32_t bit = 1u << thread->lane;
  warp.alive &= ~bit;
  warp.ready &= ~bit;
  if (warp.ready == 0) thread->block->ready_warps &= ~(1u << warp.id);
  --thread->block->alive;
  thread->done = true;
  leave_warp(thread);
  leave_barriers(thread);
}

void fiber_main() {
  arrived_on_fiber(current()->fiber);
  for (;;) {
    Thread* thread = current();
    Block& block = *thread->block;
    try {
      block.entry(block.argument);
      end_thread(thread);
    } catch (Fault&) {
      block.failed = true;
    } catch (const std::exception& error) {
      block.failed = true;
      if (block.error.empty()) block.error = fmt::format("sim: exception in {}: {}", describe(block), error.what());
    }
    reschedule(thread);  // parked here until the next block starts this fiber again
  }
}

}  // namespace

void mark_ready(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (warp.ready != 0) warp.block->ready_warps |= 1u << warp.id;
}

void make_ready(Thread* thread) {
  thread->waits_in = nullptr;
  mark_ready(*thread->warp, 1u << thread->lane);
}

void post_event(Block& block, uint64_t delay, std::function<void()> land) {
  block.events.push_back({block.steps + delay, block.events_posted++, std::move(land)});
  block.next_due = std::min(block.next_due, block.events.back().due);
}

void reschedule(Thread* from) {
  Block& block = *from->block;
  Thread* next = block.failed ? nullptr : pick(block);
  if (!block.failed && next == nullptr && block.alive > 0) {
    block.failed = true;
    if (block.error.empty()) block.error = fmt::format("sim: deadlock: {}; {}", deadlock_text(block), describe(block));
  }
  if (block.failed || next == nullptr) next = &block.launcher;
  if (next != from) switch_to(*from, *next);
}

void block_on(const char* operation, Site site) {
  Thread* thread = current();
  thread->waits_in = operation;
  thread->waits_at = site;
  Warp& warp = *thread->warp;
  warp.ready &= ~(1u << thread->lane);
  if (warp.ready == 0) thread->block->ready_warps &= ~(1u << warp.id);
  reschedule(thread);
}

void yield() { reschedule(current()); }

void start_block(Block& block) {
  for (int i = 0; i < block.num_threads; ++i) {
    Thread& thread = block.threads[i];
    if (thread.started) continue;
    prepare(thread.fiber, i, fiber_main);
    thread.started = true;
  }
  adopt_this_thread(block.launcher.fiber);
  block.launcher.block = &block;
  switch_to(block.launcher, *pick(block));
  current_view = nullptr;
  if (block.failed) return;
  block.error = fault_at_block_end(block);
}

}  // namespace lightmoe::simulator
