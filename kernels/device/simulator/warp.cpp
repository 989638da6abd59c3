// Warp collectives. Lanes that are named together must come to the same operation at the same place in the source; anything else is
// reported as divergence with both places. Two collectives on one source line cannot be told apart.
#include <algorithm>
#include <bit>

#include "kernels/device/simulator/race.h"

namespace lightmoe::simulator {
namespace {

template <class F>
void for_lanes(uint32_t lanes, F&& f) {
  for (; lanes != 0; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

void complete(Warp& warp, Rendezvous& slot, int self) {
  const Rendezvous meeting = slot;
  slot.used = false;  // before the function, which may fail
  ++warp.block->statistics.collectives;
  const uint32_t others = self < 0 ? meeting.arrived : meeting.arrived & ~(1u << self);
  for_lanes(others, [&](int lane) { warp.block->threads[warp.id * 32 + lane].waits_in = nullptr; });
  mark_ready(warp, others);
  meeting.function(meeting.arrived, const_cast<void**>(meeting.arguments), warp);
}

Rendezvous& find_slot(Warp& warp, uint32_t mask, uint32_t bit, const char* operation, Site site) {
  Rendezvous* unused = nullptr;
  for (Rendezvous& slot : warp.rendezvous) {
    if (!slot.used) {
      if (unused == nullptr) unused = &slot;
      continue;
    }
    if (slot.mask == mask && (slot.arrived & bit) == 0) return slot;
    if ((slot.mask & mask & ~slot.arrived & bit) != 0) {
      fault("warp divergence", site, "{} with mask {:#010x}, but lanes {:#010x} wait in {} with mask {:#010x} at {}",
            operation, mask, slot.arrived, slot.operation, slot.mask, place(slot.site));
    }
  }
  if (unused == nullptr) fault("warp divergence", site, "{}: too many different warp operations are open", operation);
  *unused = Rendezvous{.used = true, .mask = mask, .operation = operation, .site = site};
  return *unused;
}

}  // namespace

void rendezvous(uint32_t mask, const char* operation, Site site, void* argument, CollectiveFunction function,
                bool whole_warp) {
  Thread* thread = current();
  Warp& warp = *thread->warp;
  const uint32_t bit = 1u << thread->lane;
  if ((mask & bit) == 0) {
    fault("warp mask", site, "{}: calling lane {} is not in mask {:#010x}", operation, thread->lane, mask);
  }
  if (whole_warp && warp.alive != kFullWarp) {
    fault("warp divergence", site, "{} needs all 32 lanes; alive are {:#010x}", operation, warp.alive);
  }
  Rendezvous& slot = find_slot(warp, mask, bit, operation, site);
  if (slot.arrived != 0 && (std::string_view(slot.operation) != operation || !same_place(slot.site, site))) {
    fault("warp divergence", site, "lane {} is in {} at {}, lanes {:#010x} are in {} at {}", thread->lane, operation,
          place(site), slot.arrived, slot.operation, place(slot.site));
  }
  slot.function = function;
  slot.whole_warp = whole_warp;
  slot.arguments[thread->lane] = argument;
  slot.arrived |= bit;
  if ((slot.arrived & warp.alive) == (mask & warp.alive)) {
    complete(warp, slot, thread->lane);
  } else {
    block_on(operation, site);
  }
}

void leave_warp(Thread* thread) {
  Warp& warp = *thread->warp;
  for (Rendezvous& slot : warp.rendezvous) {
    if (!slot.used) continue;
    if (slot.whole_warp) {
      fault("warp divergence", slot.site, "lane {} ended while lanes {:#010x} wait in {}", thread->lane, slot.arrived,
            slot.operation);
    }
    if ((slot.arrived & warp.alive) == (slot.mask & warp.alive)) complete(warp, slot, -1);
  }
}

void sync_warp(uint32_t mask, Site site) {
  rendezvous(
      mask, "sync_warp", site, nullptr, [](uint32_t lanes, void**, Warp& warp) { race::sync_warp(warp, lanes); },
      false);
}

namespace {

struct ShuffleArgument {
  uint64_t value, result;
  int source, width;
  Shuffle mode;
  Site site;
};

// Lane that `lane` reads; shuffles that leave the segment of `width` lanes return the lane's own value.
int source_lane(const ShuffleArgument& a, int lane) {
  const int first = lane & ~(a.width - 1), last = first + a.width - 1;
  switch (a.mode) {
    case Shuffle::kIndex:
      return first | (a.source & (a.width - 1));
    case Shuffle::kUp:
      return lane - a.source < first ? lane : lane - a.source;
    case Shuffle::kDown:
      return lane + a.source > last ? lane : lane + a.source;
    case Shuffle::kXor:
      break;
  }
  return (lane ^ a.source) > last ? lane : lane ^ a.source;
}

void run_shuffle(uint32_t lanes, void** arguments, Warp&) {
  for_lanes(lanes, [&](int lane) {
    auto& a = *static_cast<ShuffleArgument*>(arguments[lane]);
    const int source = source_lane(a, lane);
    if (source < 0 || source > 31 || (lanes >> source & 1) == 0) {
      fault("warp shuffle", a.site, "lane {} reads lane {}, which takes no part (mask {:#010x})", lane, source, lanes);
    }
    a.result = static_cast<ShuffleArgument*>(arguments[source])->value;
  });
}

}  // namespace

uint64_t shuffle(uint32_t mask, uint64_t bits, int source, int width, Shuffle mode, Site site) {
  constexpr const char* kNames[] = {"shuffle", "shuffle_up", "shuffle_down", "shuffle_xor"};
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fault("warp shuffle", site, "width {} is not a power of two up to 32", width);
  }
  ShuffleArgument argument{bits, 0, source, width, mode, site};
  rendezvous(mask, kNames[static_cast<int>(mode)], site, &argument, run_shuffle, false);
  return argument.result;
}

namespace {

struct VoteArgument {
  uint64_t value;
  uint32_t result;
  WarpReduce op;
};
VoteArgument& vote(void** arguments, int lane) { return *static_cast<VoteArgument*>(arguments[lane]); }

uint32_t combine(WarpReduce op, uint32_t a, uint32_t b) {
  const int32_t sa = static_cast<int32_t>(a), sb = static_cast<int32_t>(b);
  switch (op) {
    case WarpReduce::kAdd:
      return a + b;
    case WarpReduce::kMinU:
      return std::min(a, b);
    case WarpReduce::kMaxU:
      return std::max(a, b);
    case WarpReduce::kMinS:
      return static_cast<uint32_t>(std::min(sa, sb));
    case WarpReduce::kMaxS:
      return static_cast<uint32_t>(std::max(sa, sb));
    case WarpReduce::kAnd:
      return a & b;
    case WarpReduce::kOr:
      return a | b;
    case WarpReduce::kXor:
      break;
  }
  return a ^ b;
}

void run_ballot(uint32_t lanes, void** arguments, Warp&) {
  uint32_t votes = 0;
  for_lanes(lanes, [&](int lane) { votes |= vote(arguments, lane).value != 0 ? 1u << lane : 0u; });
  for_lanes(lanes, [&](int lane) { vote(arguments, lane).result = votes; });
}

void run_match_any(uint32_t lanes, void** arguments, Warp&) {
  for_lanes(lanes, [&](int lane) {
    uint32_t equal = 0;
    for_lanes(lanes, [&](int other) {
      equal |= vote(arguments, other).value == vote(arguments, lane).value ? 1u << other : 0u;
    });
    vote(arguments, lane).result = equal;
  });
}

void run_reduce(uint32_t lanes, void** arguments, Warp&) {
  const int first = std::countr_zero(lanes);
  auto result = static_cast<uint32_t>(vote(arguments, first).value);
  for_lanes(lanes & (lanes - 1), [&](int lane) {
    result = combine(vote(arguments, first).op, result, static_cast<uint32_t>(vote(arguments, lane).value));
  });
  for_lanes(lanes, [&](int lane) { vote(arguments, lane).result = result; });
}

// PTX promises one leader, the same for the same mask; not which one.
void run_elect(uint32_t lanes, void** arguments, Warp& warp) {
  uint32_t rest = lanes;
  for (int skip = warp.elected % std::popcount(lanes); skip > 0; --skip) rest &= rest - 1;
  for_lanes(lanes, [&](int lane) { vote(arguments, lane).result = static_cast<uint32_t>(std::countr_zero(rest)); });
}

}  // namespace

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  VoteArgument argument{predicate, 0, WarpReduce::kOr};
  rendezvous(mask, "vote", site, &argument, run_ballot, false);
  return argument.result;
}
uint32_t match_any(uint32_t mask, uint64_t bits, Site site) {
  VoteArgument argument{bits, 0, WarpReduce::kOr};
  rendezvous(mask, "match_any", site, &argument, run_match_any, false);
  return argument.result;
}
uint32_t reduce(uint32_t mask, uint32_t value, WarpReduce op, Site site) {
  VoteArgument argument{value, 0, op};
  rendezvous(mask, "warp reduce", site, &argument, run_reduce, false);
  return argument.result;
}
int elect(uint32_t mask, Site site) {
  VoteArgument argument{0, 0, WarpReduce::kOr};
  rendezvous(mask, "elect.sync", site, &argument, run_elect, true);
  return static_cast<int>(argument.result);
}

}  // namespace lightmoe::simulator
