// wgmma. Each warp of a warpgroup owns 16 rows of D and is simulated alone: PTX synchronises the lanes of a warp, not the four warps.
// Between issue and wait the accumulator registers hold NaN; operands are read at issue and compared at completion.
// NOTE: wait_group speaks here for the warp that executes it only; whether the hardware holds the four warps together is not assumed.
#include <bit>
#include <cstring>

#include "kernels/device/simulator/layouts.h"
#include "kernels/device/simulator/race.h"

namespace lightmoe::simulator {
namespace {

const float kPoison = __builtin_nanf("0x7ffff");

struct Argument {
  float* d;
  WgmmaOperands operands;
  Site site;
};
const Argument& argument_of(void** arguments, int lane) { return *static_cast<Argument*>(arguments[lane]); }

uint16_t shared_element(const Block& block, uint32_t address, const char* operand, Site site) {
  if (address < kSharedBase || address + 2 > kSharedBase + block.shared_bytes) {
    fault("shared out of bounds", site, "wgmma operand {} reads shared byte {}, the block has {}", operand,
          static_cast<int64_t>(address) - kSharedBase, block.shared_bytes);
  }
  uint16_t value;
  std::memcpy(&value, block.shared + (address - kSharedBase), 2);
  return value;
}

std::vector<uint16_t> gather_a(const Warp& warp, const WgmmaOperands& o, Site site) {
  std::vector<uint16_t> a(256);
  const layout::Descriptor descriptor(o.a);
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t address = layout::operand_address(descriptor, warp.id % 4 * 16 + m, k, o.a_mn_major);
      a[static_cast<size_t>(m * 16 + k)] = shared_element(*warp.block, address, "A", site);
    }
  }
  return a;
}

std::vector<uint16_t> gather_registers(void** arguments) {
  std::vector<uint16_t> a(256);
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 8; ++e) {
      const auto at = layout::mma_a(lane, e);
      const uint32_t word = argument_of(arguments, lane).operands.a_registers[e / 2];
      a[static_cast<size_t>(at.row * 16 + at.column)] = static_cast<uint16_t>(word >> (16 * (e & 1)));
    }
  }
  return a;
}

std::vector<uint16_t> gather_b(const Warp& warp, const WgmmaOperands& o, Site site) {
  std::vector<uint16_t> b(static_cast<size_t>(16 * o.n));
  const layout::Descriptor descriptor(o.b);
  for (int n = 0; n < o.n; ++n) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t address = layout::operand_address(descriptor, n, k, o.b_mn_major);
      b[static_cast<size_t>(k * o.n + n)] = shared_element(*warp.block, address, "B", site);
    }
  }
  return b;
}

// Calls f(pointer) for every 16 bytes that the operation reads from shared memory.
template <class F>
void for_operand_pieces(const Warp& warp, const WgmmaOperands& o, F&& f) {
  const auto piece = [&](uint32_t address) { f(warp.block->shared + (address - kSharedBase)); };
  const layout::Descriptor a(o.a), b(o.b);
  const auto pieces = [&](const layout::Descriptor& d, int first, int count, bool mn_major) {
    const int step = mn_major ? 8 : 1, k_step = mn_major ? 1 : 8;
    for (int mn = first; mn < first + count; mn += step) {
      for (int k = 0; k < 16; k += k_step) piece(layout::operand_address(d, mn, k, mn_major));
    }
  };
  if (o.a_registers == nullptr) pieces(a, warp.id % 4 * 16, 16, o.a_mn_major);
  pieces(b, 0, o.n, o.b_mn_major);
}

bool same_operands(const WgmmaOperands& x, const WgmmaOperands& y) {
  const bool same_a =
      (x.a_registers != nullptr) == (y.a_registers != nullptr) && (x.a_registers != nullptr || x.a == y.a);
  return same_a && x.b == y.b && x.n == y.n && x.accumulate == y.accumulate && x.b_mn_major == y.b_mn_major &&
         x.a_mn_major == y.a_mn_major;
}

void check_operands(Warp& warp, void** arguments) {
  const Argument& first = argument_of(arguments, 0);
  for (int lane = 1; lane < 32; ++lane) {
    if (!same_operands(first.operands, argument_of(arguments, lane).operands)) {
      fault("wgmma", first.site, "descriptors or accumulate differ between the lanes of a warp");
    }
  }
  Block& block = *warp.block;
  if (block.num_warps < (warp.id / 4 + 1) * 4) fault("wgmma", first.site, "warp {} is in no whole warpgroup", warp.id);
  const bool a_base = first.operands.a_registers == nullptr && layout::Descriptor(first.operands.a).base_offset != 0;
  if (a_base || layout::Descriptor(first.operands.b).base_offset != 0) {
    fault("wgmma", first.site, "non-zero base offset: not simulated");
  }
  std::vector<WgmmaRecord>& records = block.wgmma_records[warp.id / 4];
  const uint64_t number = warp.wgmma.issued++;
  if (number >= records.size()) {
    records.push_back({first.operands, first.site});
  } else if (!same_operands(records[number].operands, first.operands)) {
    fault("wgmma", first.site, "the warps of a warpgroup issue different wgmma (here and at {})",
          place(records[number].site));
  }
}

// The record of the accumulator registers at these addresses, one array per lane.
int find_accumulator(Warp& warp, void** arguments, int registers) {
  std::vector<WgmmaAccumulator>& all = warp.wgmma.accumulators;
  WgmmaAccumulator fresh{.lanes = {}, .registers = registers, .pending = 0, .values = {}, .last_returned = {}};
  for (int lane = 0; lane < 32; ++lane) fresh.lanes[lane] = argument_of(arguments, lane).d;
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].registers == registers && std::memcmp(all[i].lanes, fresh.lanes, sizeof fresh.lanes) == 0)
      return static_cast<int>(i);
  }
  all.push_back(fresh);
  return static_cast<int>(all.size() - 1);
}

// First use since the last wait: wgmma takes the values out of the registers, which a fence must have made ready.
void take_registers(Warp& warp, WgmmaAccumulator& accumulator, const Argument& first) {
  const auto registers = static_cast<size_t>(accumulator.registers);
  accumulator.values.resize(32 * registers);
  for (size_t lane = 0; lane < 32; ++lane) {
    std::memcpy(&accumulator.values[lane * registers], accumulator.lanes[lane], registers * sizeof(float));
  }
  const bool never_used = accumulator.last_returned.empty();
  const bool touched = never_used || std::memcmp(accumulator.values.data(), accumulator.last_returned.data(),
                                                 accumulator.values.size() * sizeof(float)) != 0;
  if (!warp.wgmma.fenced && touched && (never_used || first.operands.accumulate)) {
    fault("wgmma", first.site,
          "no wgmma.fence between ordinary access to the accumulator registers and wgmma.mma_async");
  }
}

void issue(uint32_t, void** arguments, Warp& warp) {
  check_operands(warp, arguments);
  const Argument& first = argument_of(arguments, 0);
  const WgmmaOperands& o = first.operands;
  const int index = find_accumulator(warp, arguments, o.n / 2);
  WgmmaAccumulator& accumulator = warp.wgmma.accumulators[static_cast<size_t>(index)];
  if (accumulator.pending == 0) take_registers(warp, accumulator, first);
  for (float* registers : accumulator.lanes) {
    for (int i = 0; i < accumulator.registers; ++i) registers[i] = kPoison;
  }
  ++accumulator.pending;
  WgmmaOperation operation{index, o, {}, gather_b(warp, o, first.site), first.site};
  operation.a = o.a_registers != nullptr ? gather_registers(arguments) : gather_a(warp, o, first.site);
  if constexpr (race::kEnabled) {
    for_operand_pieces(warp, o, [&](const void* p) { race::wgmma_read_begin(warp, p, 16, first.site); });
  }
  warp.wgmma.open.push_back(std::move(operation));
  ++warp.block->statistics.wgmma;
}

void multiply(const WgmmaOperation& operation, std::vector<float>& values) {
  const int n = operation.operands.n, registers = n / 2;
  const auto columns = static_cast<size_t>(n);
  std::vector<float> d(16 * columns, 0.0f), b(16 * columns);
  const auto to_float = [](uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); };
  for (size_t i = 0; i < b.size(); ++i) b[i] = to_float(operation.b[i]);
  const auto element = [&](int lane, int e) -> float& {
    const auto at = layout::wgmma_d(lane, e);
    return d[static_cast<size_t>(at.row) * columns + static_cast<size_t>(at.column)];
  };
  for (int i = 0; i < 32 * registers && operation.operands.accumulate; ++i) {
    element(i / registers, i % registers) = values[static_cast<size_t>(i)];
  }
  for (size_t m = 0; m < 16; ++m) {
    for (size_t k = 0; k < 16; ++k) {
      const float a = to_float(operation.a[m * 16 + k]);
      for (size_t j = 0; j < columns; ++j) d[m * columns + j] += a * b[k * columns + j];
    }
  }
  for (int i = 0; i < 32 * registers; ++i) values[static_cast<size_t>(i)] = element(i / registers, i % registers);
}

void finish(Warp& warp, WgmmaOperation& operation) {
  const WgmmaOperands& o = operation.operands;
  const bool a_changed = o.a_registers == nullptr && gather_a(warp, o, operation.site) != operation.a;
  if (a_changed || gather_b(warp, o, operation.site) != operation.b) {
    fault("async race", operation.site, "wgmma operand {} in shared memory changed between issue and wait",
          a_changed ? "A" : "B");
  }
  if constexpr (race::kEnabled) {
    for_operand_pieces(warp, o, [&](const void* p) { race::wgmma_read_end(warp, p, 16, operation.site); });
  }
  WgmmaAccumulator& accumulator = warp.wgmma.accumulators[static_cast<size_t>(operation.accumulator)];
  multiply(operation, accumulator.values);
  if (--accumulator.pending > 0) return;
  const auto registers = static_cast<size_t>(accumulator.registers);
  for (size_t lane = 0; lane < 32; ++lane) {
    std::memcpy(accumulator.lanes[lane], &accumulator.values[lane * registers], registers * sizeof(float));
  }
  accumulator.last_returned = accumulator.values;
}

}  // namespace

void wgmma_fence(Site site) {
  rendezvous(
      kFullWarp, "wgmma.fence", site, nullptr, [](uint32_t, void**, Warp& warp) { warp.wgmma.fenced = true; }, true);
}

void wgmma_bf16(float* d, const WgmmaOperands& operands, Site site) {
  Argument argument{d, operands, site};
  rendezvous(kFullWarp, "wgmma.mma_async", site, &argument, issue, true);
}

void wgmma_commit(Site site) {
  rendezvous(
      kFullWarp, "wgmma.commit_group", site, nullptr,
      [](uint32_t, void**, Warp& warp) {
        warp.wgmma.groups.push_back(std::move(warp.wgmma.open));
        warp.wgmma.open.clear();
      },
      true);
}

void wgmma_wait(int groups_left, Site site) {
  rendezvous(
      kFullWarp, "wgmma.wait_group", site, &groups_left,
      [](uint32_t, void** arguments, Warp& warp) {
        std::vector<std::vector<WgmmaOperation>>& groups = warp.wgmma.groups;
        const auto left = static_cast<size_t>(*static_cast<int*>(arguments[0]));
        if (groups.size() > left) {
          while (groups.size() > left) {
            for (WgmmaOperation& operation : groups.front()) finish(warp, operation);
            groups.erase(groups.begin());
          }
          race::wgmma_done(warp);
        }
        warp.wgmma.fenced = false;
      },
      true);
}

void check_wgmma_at_thread_end(const Thread& thread) {
  const WgmmaState& state = thread.warp->wgmma;
  if (!state.open.empty()) fault("async", state.open[0].site, "the warp ends with a wgmma that was never committed");
  for (const std::vector<WgmmaOperation>& group : state.groups) {
    if (!group.empty()) fault("async", group[0].site, "the warp ends with a wgmma that was never waited for");
  }
}

std::string fault_at_block_end(const Block& block) {
  if (!block.events.empty()) {
    return fmt::format("sim: async: a bulk copy into shared memory is still in flight at the end; {}", describe(block));
  }
  for (int w = 0; w < block.num_warps; ++w) {
    if (block.warps[w].wgmma.issued != block.warps[w / 4 * 4].wgmma.issued) {
      return fmt::format("sim: wgmma: the warps of warpgroup {} issued different numbers of wgmma; {}", w / 4,
                         describe(block));
    }
  }
  return {};
}

}  // namespace lightmoe::simulator
