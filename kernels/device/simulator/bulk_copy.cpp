// Bulk copies (cp.async.bulk, TMA): the destination is poisoned at issue; the bytes land as early, as late or as randomly as the launch's
// options say, then count towards the mbarrier. The source is compared at landing, so a change in flight is found.
#include <algorithm>
#include <cstring>

#include "kernels/device/simulator/layouts.h"
#include "kernels/device/simulator/race.h"
#include "kernels/device/tensor_map_bytes.h"

namespace lightmoe::simulator {
namespace {

constexpr uint64_t kLatest = uint64_t{1} << 40;  // steps; nobody runs that long, so it lands when all threads wait

struct Piece {
  unsigned char* to;
  const unsigned char* from;  // null: zeros
  uint32_t bytes;
};

uint64_t landing_delay(Block& block) {
  switch (block.async) {
    case AsyncTiming::kEarly:
      return 0;
    case AsyncTiming::kRandom:
      return block.random.below(3) == 0 ? 0 : block.random.below(2000);
    default:
      return kLatest;
  }
}

void issue(std::vector<Piece> pieces, unsigned char* destination, uint32_t bytes, uint64_t* barrier, Site site) {
  Thread* thread = current();
  Block* block = thread->block;
  find_mbarrier(barrier, "bulk copy", site);
  const uint32_t barrier_address = shared_offset(*block, barrier, 8, "bulk copy", site);
  std::vector<unsigned char> data(bytes, 0);
  uint32_t at = 0;
  for (const Piece& piece : pieces) {
    if (piece.from != nullptr) {
      race::access(thread, piece.from, piece.bytes, false, false, site);
      std::memcpy(&data[at], piece.from, piece.bytes);
    }
    at += piece.bytes;
  }
  race::copy_begin(thread, destination, bytes, site);
  std::memset(destination, 0xff, bytes);
  ++block->statistics.bulk_copies;
  const uint64_t delay = landing_delay(*block);
  post_event(*block, delay, [=, pieces = std::move(pieces), data = std::move(data)] {
    uint32_t from = 0;
    for (const Piece& piece : pieces) {
      if (piece.from != nullptr && std::memcmp(&data[from], piece.from, piece.bytes) != 0) {
        fault("async race", site, "bulk copy: the source changed while the copy was in flight");
      }
      std::memcpy(piece.to, &data[from], piece.bytes);
      from += piece.bytes;
    }
    const auto found = block->mbarriers.find(barrier_address);
    if (found == block->mbarriers.end())
      fault("mbarrier", site, "bulk copy completes on a barrier that no longer exists");
    race::bulk_copy_end(*block, destination, bytes, site, found->second.clock);
    found->second.pending_bytes -= static_cast<int>(bytes);
    complete_phase_if_due(found->second);
  });
}

// Eight elements of a box's row, some of which may lie outside the matrix and are zero.
void add_pieces(std::vector<Piece>& pieces, const TensorMapFields& map, unsigned char* to, int64_t row,
                int64_t column) {
  const bool row_inside = row >= 0 && row < static_cast<int64_t>(map.rows);
  const int64_t low = row_inside ? std::clamp<int64_t>(-column, 0, 8) : 8;
  const int64_t high = std::max(low, std::clamp<int64_t>(static_cast<int64_t>(map.columns) - column, 0, 8));
  const auto add = [&](int64_t begin, int64_t end, bool inside) {
    if (end <= begin) return;
    const unsigned char* from = map.base + row * static_cast<int64_t>(map.row_bytes) + (column + begin) * 2;
    pieces.push_back({to + begin * 2, inside ? from : nullptr, static_cast<uint32_t>((end - begin) * 2)});
  };
  add(0, low, false);
  add(low, high, true);
  add(high, 8, false);
}

}  // namespace

void tma_load_2d(void* shared, const void* map, int column, int row, uint64_t* barrier, Site site) {
  TensorMapFields fields;
  std::memcpy(&fields, map, sizeof fields);
  if (fields.magic != kTensorMapMagic) fault("TMA", site, "not a tensor map made by make_tensor_map");
  const uint32_t row_bytes = fields.box_columns * 2, bytes = row_bytes * fields.box_rows;
  const uint32_t address = shared_offset(*current()->block, shared, bytes, "TMA destination", site);
  const auto swizzle = static_cast<layout::Swizzle>(fields.swizzle);
  const uint32_t alignment = swizzle == layout::Swizzle::kNone ? 128 : 8 * row_bytes;
  if (address % alignment != 0) {
    fault("alignment", site, "TMA: the destination (shared byte {}) must be a multiple of {}", address - kSharedBase,
          alignment);
  }
  unsigned char* origin = static_cast<unsigned char*>(shared) - address;
  std::vector<Piece> pieces;
  for (uint32_t r = 0; r < fields.box_rows; ++r) {
    for (uint32_t c = 0; c < row_bytes; c += 16) {  // the swizzle moves 16-byte pieces
      add_pieces(pieces, fields, origin + layout::swizzled(address + r * row_bytes + c, swizzle), int64_t{row} + r,
                 int64_t{column} + c / 2);
    }
  }
  issue(std::move(pieces), static_cast<unsigned char*>(shared), bytes, barrier, site);
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Site site) {
  check_alignment(shared, 16, site);
  check_alignment(global, 16, site);
  if (bytes % 16 != 0) fault("alignment", site, "cp.async.bulk: {} bytes are no multiple of 16", bytes);
  shared_offset(*current()->block, shared, bytes, "cp.async.bulk destination", site);
  auto* to = static_cast<unsigned char*>(shared);
  issue({{to, static_cast<const unsigned char*>(global), bytes}}, to, bytes, barrier, site);
}

}  // namespace lightmoe::simulator
