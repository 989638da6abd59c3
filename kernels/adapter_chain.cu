#include "kernels/adapter_tiles.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

template <class E>
struct ChainShared {
  ChainMatrices<E> matrices;
  E u[kStripRows][2 * kMaxRank + kPad];
  E a[kStripRows][kTileColumns + kPad];
  float s[kTileRows][kTileColumns + kPad];
  SlotRanges ranges;
  StripPairs strip;
};

// a of one strip: into the sums of its visits, and as an operand for A_down.
template <class E>
DEVICE_FN void activate_strip(ChainShared<E>& shared, const StripHidden<E>& h, int own_column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = strip_row(half), visit = shared.strip.visit[row];
    const float gate = shared.strip.gate[row];
#pragma unroll
    for (int e = 0; e < 2 * kFragments; ++e) {
      const int j = e / 2, i = 2 * half + e % 2, column = own_column + strip_column(j) + e % 2;
      const float a = h.gate[j][i] * sigmoid(h.gate[j][i]) * h.up[j][i];
      if (visit >= 0) shared.s[visit][column] += gate * a;
      shared.a[row][column] = from_float<E>(visit >= 0 ? a : 0.0f);
    }
  }
}

// One block: visits of a tile, the chunks of F of one part. parts [num parts][P][rank]: A_down a summed over the part's chunks.
template <class E, class W>
__global__ void __launch_bounds__(kTileThreads, 1)
    adapter_chain_kernel(const __grid_constant__ ChainPlan p, const E* h0, const E* u, E* s, float* parts) {
  auto& shared = shared_memory<ChainShared<E>>();
  const GroupTile tile = find_group_tile(p, static_cast<int>(blockIdx.x));
  if (tile.count == 0) return;  // the whole block
  const int first_slot = p.group_positions[tile.group], last_slot = p.group_positions[tile.group + 1];
  find_ranges(shared.ranges, p.pair_visit, p.slot_offsets, first_slot, last_slot, tile.first, tile.count);
  const int first_chunk = static_cast<int>(blockIdx.y) * p.chunks_of_part, own_column = warp_id() * 8 * kFragments;
  const int last_chunk = std::min(first_chunk + p.chunks_of_part, ceil_div(p.width, kTileColumns));
  float* part = parts + static_cast<int64_t>(blockIdx.y) * p.num_pairs * p.rank_stride;
  h0 += static_cast<int64_t>(tile.first) * 2 * p.width, s += static_cast<int64_t>(tile.first) * p.width;
  for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int column = chunk * kTileColumns;
    sync_block();  // the sums of the chunk before are stored
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kTileColumns; i += kTileThreads) {
      shared.s[i / kTileColumns][i % kTileColumns] = 0;
    }
    for (int slot = first_slot; slot < last_slot; ++slot) {
      const int rank = p.rank[slot], end = shared.ranges.end[slot];
      sync_block();  // nobody reads the matrices of the slot before
      if (shared.ranges.begin[slot] == end) continue;
      if (rank > 0) load_matrices<W>(shared.matrices, p, slot, column);
      for (int pair = shared.ranges.begin[slot]; pair < end; pair += kStripRows) {
        load_strip(shared.strip, p, tile.first, pair, end);
        if (rank > 0) {
          load_strip_rows(shared.u[0], 2 * kMaxRank + kPad, u, 2 * p.rank_stride, rank, true, pair, end);
        }
        sync_block();
        StripHidden<E> h(p, shared.strip, h0, column + own_column);
        if (rank > 0) h.add_low_rank(shared.u, shared.matrices, rank, own_column);
        activate_strip(shared, h, own_column);
        sync_block();
        for (int r = warp_id() * 16; r < rank; r += kTileWarps * 16) {
          float w[2][4] = {};
          strip_product<2, true, true>(w, StripOperand<E>{shared.a[0], kTileColumns + kPad},
                                       StripOperand<E>{shared.matrices.a_down[r], kTileColumns + kPad}, kTileColumns);
          add_to_part(part, p.rank_stride, w, pair, end, r, rank, chunk == first_chunk);
        }
      }
    }
    sync_block();
    for (int i = static_cast<int>(threadIdx.x); i < tile.count * kTileColumns / 2; i += kTileThreads) {
      const int row = i / (kTileColumns / 2), c = i % (kTileColumns / 2) * 2;
      store_two(s + static_cast<int64_t>(row) * p.width + column + c, p.width - column - c, p.pairs_together,
                shared.s[row][c], shared.s[row][c + 1]);
    }
  }
}

template <class E, class W>
void chain(const AdapterChain& op) {
  ChainPlan p = chain_plan(op.plan, op.adapters, op.h0, op.gates, op.done);
  const uint32_t tiles = group_tiles(op.plan.num_visits, p.groups);
  const int parts = parts_of(p, tiles);
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor sums = Tensor::empty({parts, p.num_pairs, p.rank_stride}, DType::kF32, kDevice);
  launch<adapter_chain_kernel<E, W>>({.blocks = {tiles, static_cast<uint32_t>(parts)},
                                      .threads = {kTileThreads},
                                      .shared_bytes = sizeof(ChainShared<E>)},
                                     p, op.h0.data<E>(), op.u.defined() ? op.u.data<E>() : nullptr, op.s.data<E>(),
                                     sums.data<float>());
  if (op.w.defined()) add_parts(op.plan, p, sums, p.gates, op.w);
}

void chain_device(const AdapterChain& op) {
  visit_device_floating("adapter_chain", op.h0.dtype(), [&]<class E>() {
    visit_device_floating("adapter_chain", type_of(op.adapters), [&]<class W>() { chain<E, W>(op); });
  });
}
const RegisterKernel<AdapterChain> register_chain{kDevice, &chain_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
