#include "kernels/adapter_gradient_strip.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

template <class E>
struct BackwardShared {
  ChainMatrices<E> matrices;
  E u[kStripRows][2 * kMaxRank + kPad], e[kStripRows][kMaxRank + kPad];
  E dh[kStripRows][2 * kTileColumns + kPad];
  float dh0[kTileRows][2 * kTileColumns + kPad], s[kTileRows][kTileColumns + kPad];
  float dot[kTileWarps][kStripRows];  // <c, a> over a warp's columns
  SlotRanges ranges;
  StripPairs strip;
};

// Of one strip: dh into the sums of its visits and as an operand for B, g a into s, <c, a> over the warp's columns.
template <class E>
DEVICE_FN void differentiate_strip(BackwardShared<E>& shared, const StripGradient<E>& at, int own_column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = strip_row(half), visit = shared.strip.visit[row];
    const float gate = shared.strip.gate[row];
    float dot = 0;
#pragma unroll
    for (int e = 0; e < 2 * kFragments; ++e) {
      const int j = e / 2, i = 2 * half + e % 2, column = own_column + strip_column(j) + e % 2;
      const StripElement d = at.element(j, i, gate);
      dot += at.c[j][i] * d.a;
      shared.dh[row][column] = from_float<E>(d.dgate);
      shared.dh[row][kTileColumns + column] = from_float<E>(d.dup);
      if (visit < 0) continue;
      shared.dh0[visit][column] += d.dgate;
      shared.dh0[visit][kTileColumns + column] += d.dup;
      shared.s[visit][column] += gate * d.a;
    }
    dot += shuffle_xor(dot, 1);
    dot += shuffle_xor(dot, 2);
    if (lane_id() % 4 == 0) shared.dot[warp_id()][row] = dot;
  }
}

struct BackwardParts {
  float *du, *dgates;  // [parts][P][2 rank], [parts][P]
};

// du and <c, a> of a strip, summed over the chunks of a part.
template <class E>
DEVICE_FN void add_strip_parts(const BackwardShared<E>& shared, const ChainPlan& p, const BackwardParts& part, int rank,
                               int pair, int end, bool first) {
  const int padded = pad_16(rank);
  for (int task = warp_id() * 16; task < 2 * padded; task += kTileWarps * 16) {
    const int half = task >= padded ? 1 : 0, r = task - half * padded;
    const auto& b = half == 0 ? shared.matrices.b_gate : shared.matrices.b_up;
    float du[2][4] = {};
    strip_product<2, true, false>(du, StripOperand<E>{shared.dh[0] + half * kTileColumns, 2 * kTileColumns + kPad},
                                  StripOperand<E>{b[0] + r, kMaxRank + kPad}, kTileColumns);
    add_to_part(part.du + half * rank, 2 * p.rank_stride, du, pair, end, r, rank, first);
  }
  const int i = static_cast<int>(threadIdx.x);
  if (i < kStripRows && pair + i < end) {
    float dot = 0;
#pragma unroll
    for (int w = 0; w < kTileWarps; ++w) dot += shared.dot[w][i];
    part.dgates[pair + i] = first ? dot : part.dgates[pair + i] + dot;
  }
}

template <class E>
struct BackwardRows {
  const E *h0, *u, *ds, *e;
  E *dh0, *s;  // s may be null
};

// The tile's columns of dh0 and s, rounded once.
template <class E>
DEVICE_FN void store_tile(const BackwardShared<E>& shared, const ChainPlan& p, const BackwardRows<E>& rows, int count,
                          int column) {
  for (int i = static_cast<int>(threadIdx.x); i < count * kTileColumns / 2; i += kTileThreads) {
    const int row = i / (kTileColumns / 2), c = i % (kTileColumns / 2) * 2, left = p.width - column - c;
    E* dh0 = rows.dh0 + static_cast<int64_t>(row) * 2 * p.width + column + c;
    store_two(dh0, left, p.pairs_together, shared.dh0[row][c], shared.dh0[row][c + 1]);
    store_two(dh0 + p.width, left, p.pairs_together, shared.dh0[row][kTileColumns + c],
              shared.dh0[row][kTileColumns + c + 1]);
    if (rows.s == nullptr) continue;
    store_two(rows.s + static_cast<int64_t>(row) * p.width + column + c, left, p.pairs_together, shared.s[row][c],
              shared.s[row][c + 1]);
  }
}

template <class E, class W>
__global__ void __launch_bounds__(kTileThreads, 1)
    adapter_chain_backward_kernel(const __grid_constant__ ChainPlan p, BackwardRows<E> rows, BackwardParts part) {
  auto& shared = shared_memory<BackwardShared<E>>();
  const GroupTile tile = find_group_tile(p, static_cast<int>(blockIdx.x));
  if (tile.count == 0) return;  // the whole block
  const int first_slot = p.group_positions[tile.group], last_slot = p.group_positions[tile.group + 1];
  find_ranges(shared.ranges, p.pair_visit, p.slot_offsets, first_slot, last_slot, tile.first, tile.count);
  const int first_chunk = static_cast<int>(blockIdx.y) * p.chunks_of_part, own_column = warp_id() * 8 * kFragments;
  const int last_chunk = std::min(first_chunk + p.chunks_of_part, ceil_div(p.width, kTileColumns));
  part.du += static_cast<int64_t>(blockIdx.y) * p.num_pairs * 2 * p.rank_stride;
  part.dgates += static_cast<int64_t>(blockIdx.y) * p.num_pairs;
  const int64_t start = static_cast<int64_t>(tile.first) * p.width;
  rows.h0 += 2 * start, rows.dh0 += 2 * start, rows.ds += start;
  if (rows.s != nullptr) rows.s += start;
  for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int column = chunk * kTileColumns;
    sync_block();  // the sums of the chunk before are stored
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kTileColumns; i += kTileThreads) {
      const int row = i / kTileColumns, c = i % kTileColumns;
      shared.dh0[row][c] = shared.dh0[row][kTileColumns + c] = shared.s[row][c] = 0;
    }
    for (int slot = first_slot; slot < last_slot; ++slot) {
      const int rank = p.rank[slot], end = shared.ranges.end[slot];
      sync_block();  // nobody reads the matrices of the slot before
      if (shared.ranges.begin[slot] == end) continue;
      if (rank > 0) load_matrices<W>(shared.matrices, p, slot, column);
      for (int pair = shared.ranges.begin[slot]; pair < end; pair += kStripRows) {
        load_strip(shared.strip, p, tile.first, pair, end);
        if (rank > 0) {
          load_strip_rows(shared.u[0], 2 * kMaxRank + kPad, rows.u, 2 * p.rank_stride, rank, true, pair, end);
          load_strip_rows(shared.e[0], kMaxRank + kPad, rows.e, p.rank_stride, rank, false, pair, end);
        }
        sync_block();
        StripGradient<E> at(p, shared.strip, rows.h0, rows.ds, column + own_column);
        if (rank > 0) at.add_low_rank(shared.u, shared.e, shared.matrices, rank, own_column);
        differentiate_strip(shared, at, own_column);
        sync_block();
        add_strip_parts(shared, p, part, rank, pair, end, chunk == first_chunk);
        sync_block();
      }
    }
    sync_block();
    store_tile(shared, p, rows, tile.count, column);
  }
}

template <class E, class W>
void chain_backward(const AdapterChainBackward& op) {
  ChainPlan p = chain_plan(op.plan, op.adapters, op.h0, op.gates, op.done);
  const uint32_t tiles = group_tiles(op.plan.num_visits, p.groups);
  const int parts = parts_of(p, tiles);
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor du = Tensor::empty({parts, p.num_pairs, 2 * p.rank_stride}, DType::kF32, kDevice);
  const Tensor dots = Tensor::empty({parts, p.num_pairs}, DType::kF32, kDevice);
  const auto data = [](const Tensor& t) { return t.defined() ? t.data<E>() : nullptr; };
  launch<adapter_chain_backward_kernel<E, W>>(
      {.blocks = {tiles, static_cast<uint32_t>(parts)},
       .threads = {kTileThreads},
       .shared_bytes = sizeof(BackwardShared<E>)},
      p, BackwardRows<E>{data(op.h0), data(op.u), data(op.ds), data(op.e), data(op.dh0), data(op.s)},
      BackwardParts{du.data<float>(), dots.data<float>()});
  if (op.du.defined()) add_parts(op.plan, p, du, nullptr, op.du);
  add_gate_parts(p, dots, op.dgates);
}

void chain_backward_device(const AdapterChainBackward& op) {
  visit_device_floating("adapter_chain_backward", op.h0.dtype(), [&]<class E>() {
    visit_device_floating("adapter_chain_backward", type_of(op.adapters), [&]<class W>() { chain_backward<E, W>(op); });
  });
}
const RegisterKernel<AdapterChainBackward> register_backward{kDevice, &chain_backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
