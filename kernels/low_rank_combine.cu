#include "kernels/adapter_tiles.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

// A block owns kTileRows tokens and kOut columns of y: it adds every slot's low-rank terms to them in shared memory, then the rows of the
// tokens' visits, and writes y once.
constexpr int kOut = 128, kDepth = 2 * kMaxRank;
constexpr int kOwn = kOut / kTileWarps;  // columns of a warp

struct CombinePlan {
  const int32_t *pair_token, *slot_offsets, *token_visit;
  int tokens, width, slots, terms, z_stride;
  bool accumulate, y_is_f32, aligned, y_aligned, rows_aligned;
  int16_t depth[kMaxSlots];
  const void* matrix[kMaxSlots];
};

template <class E, bool kTransposed>
struct CombineShared {
  static constexpr int kLines = kTransposed ? kDepth : kOut, kLine = (kTransposed ? kOut : kDepth) + kPad;
  E matrix[kLines][kLine], z[kStripRows][kDepth + kPad];
  float y[kTileRows][kOut + kPad];
  SlotRanges ranges;
  int token[kStripRows];  // of a strip's pairs, within the tile
};

// The low-rank terms of one strip of pairs, added to their tokens in the warp's columns.
template <class E, bool kTransposed>
DEVICE_FN void add_strip(CombineShared<E, kTransposed>& shared, int depth) {
  float sum[kOwn / 8][4] = {};
  const int own = warp_id() * kOwn;
  const StripOperand<E> z{shared.z[0], kDepth + kPad},
      m{kTransposed ? shared.matrix[0] + own : shared.matrix[kTransposed ? 0 : own],
        CombineShared<E, kTransposed>::kLine};
  strip_product<kOwn / 8, true, !kTransposed>(sum, z, m, pad_16(depth));
#pragma unroll
  for (int e = 0; e < kOwn / 2; ++e) {
    const int token = shared.token[strip_row(e % 4 / 2)];
    if (token >= 0) shared.y[token][own + strip_column(e / 4) + e % 2] += sum[e / 4][e % 4];
  }
}

template <class E, class W, bool kTransposed>
DEVICE_FN void add_slots(CombineShared<E, kTransposed>& shared, const CombinePlan& p, const E* z, int first,
                         int column) {
  for (int slot = 0; slot < p.slots; ++slot) {
    const int depth = p.depth[slot], end = shared.ranges.end[slot], columns = std::min(int{kOut}, p.width - column);
    sync_block();  // nobody reads the matrix before
    if (depth == 0 || shared.ranges.begin[slot] == end) continue;
    const W* from = static_cast<const W*>(p.matrix[slot]);
    const PartSize n =
        kTransposed ? PartSize{depth, columns, pad_16(depth), kOut} : PartSize{columns, depth, kOut, pad_16(depth)};
    from += kTransposed ? column : static_cast<int64_t>(column) * depth;
    load_part(shared.matrix[0], CombineShared<E, kTransposed>::kLine, from, kTransposed ? p.width : depth, n,
              p.aligned);
    for (int pair = shared.ranges.begin[slot]; pair < end; pair += kStripRows) {
      const int i = static_cast<int>(threadIdx.x);
      if (i < kStripRows) shared.token[i] = pair + i < end ? p.pair_token[pair + i] - first : -1;
      for (int n = i; n < kStripRows * pad_16(depth); n += kTileThreads) {
        const int row = n / pad_16(depth), k = n % pad_16(depth);
        const bool present = pair + row < end && k < depth;
        shared.z[row][k] = present ? z[static_cast<int64_t>(pair + row) * p.z_stride + k] : from_float<E>(0);
      }
      sync_block();
      add_strip(shared, depth);
      sync_block();
    }
  }
}

template <class Y, class E>
DEVICE_FN void finish_rows(const float (*sum)[kOut + kPad], const CombinePlan& p, const E* rows, Y* y, int first,
                           int column) {
  constexpr int kV = 8;
  for (int n = static_cast<int>(threadIdx.x); n < kTileRows * kOut / kV; n += kTileThreads) {
    const int token = n / (kOut / kV), c = n % (kOut / kV) * kV;
    if (first + token >= p.tokens) return;
    Floats<kV> total = load_floats<kV>(sum[token], c, kOut, true);
    const auto add = [&](const Floats<kV>& values) {
#pragma unroll
      for (int i = 0; i < kV; ++i) total[i] += values[i];
    };
    const int32_t* visits = p.token_visit + static_cast<int64_t>(first + token) * p.terms;
    for (int j = 0; rows != nullptr && j < p.terms; ++j) {
      if (visits[j] < 0) break;  // a token's visits come first
      add(load_floats<kV>(rows + static_cast<int64_t>(visits[j]) * p.width, column + c, p.width, p.rows_aligned));
    }
    Y* out = y + static_cast<int64_t>(first + token) * p.width;
    if (p.accumulate) add(load_floats<kV>(out, column + c, p.width, p.y_aligned));
    store_floats<kV>(out, column + c, p.width, p.y_aligned, total);
  }
}

template <class E, class W, bool kTransposed>
__global__ void __launch_bounds__(kTileThreads, 1)
    low_rank_combine_kernel(const __grid_constant__ CombinePlan p, const E* rows, const E* z, void* y) {
  auto& shared = shared_memory<CombineShared<E, kTransposed>>();
  const int first = static_cast<int>(blockIdx.x) * kTileRows, column = static_cast<int>(blockIdx.y) * kOut;
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kOut; i += kTileThreads) {
    shared.y[i / kOut][i % kOut] = 0;
  }
  if (z != nullptr) {
    find_ranges(shared.ranges, p.pair_token, p.slot_offsets, 0, p.slots, first, kTileRows);
    sync_block();
    add_slots<E, W, kTransposed>(shared, p, z, first, column);
  }
  sync_block();
  if (p.y_is_f32) return finish_rows(shared.y, p, rows, static_cast<float*>(y), first, column);
  finish_rows(shared.y, p, rows, static_cast<E*>(y), first, column);
}

CombinePlan combine_plan(const LowRankCombine& op) {
  check_chain_sizes("low_rank_combine", op.plan);
  const auto aligned = [](const Tensor& t) {
    return !t.defined() || (t.dim(1) % 8 == 0 && reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0);
  };
  CombinePlan p{.pair_token = op.plan.pair_token.data<int32_t>(),
                .slot_offsets = op.plan.slot_offsets.data<int32_t>(),
                .token_visit = op.plan.token_visit.data<int32_t>(),
                .tokens = static_cast<int>(op.y.dim(0)),
                .width = static_cast<int>(op.y.dim(1)),
                .slots = static_cast<int>(op.matrices.size()),
                .terms = static_cast<int>(op.plan.token_visit.dim(1)),
                .z_stride = op.z.defined() ? static_cast<int>(op.z.dim(1)) : 0,
                .accumulate = op.accumulate,
                .y_is_f32 = op.y.dtype() == DType::kF32,
                .aligned = true,
                .y_aligned = aligned(op.y),
                .rows_aligned = aligned(op.rows),
                .depth = {},
                .matrix = {}};
  for (size_t i = 0; i < op.matrices.size(); ++i) {
    if (!op.matrices[i].defined()) continue;
    p.depth[i] = static_cast<int16_t>(op.matrices[i].dim(op.transposed ? 0 : 1));
    p.matrix[i] = op.matrices[i].raw();
    p.aligned = p.aligned && aligned(op.matrices[i]);
  }
  return p;
}

template <class E, class W>
void combine(const LowRankCombine& op) {
  const CombinePlan p = combine_plan(op);
  const E *rows = op.rows.defined() ? op.rows.data<E>() : nullptr, *z = op.z.defined() ? op.z.data<E>() : nullptr;
  const auto with = [&]<bool kTransposed>() {
    launch<low_rank_combine_kernel<E, W, kTransposed>>({.blocks = {static_cast<uint32_t>(ceil_div(p.tokens, kTileRows)),
                                                                   static_cast<uint32_t>(ceil_div(p.width, kOut))},
                                                        .threads = {kTileThreads},
                                                        .shared_bytes = sizeof(CombineShared<E, kTransposed>)},
                                                       p, rows, z, op.y.raw());
  };
  op.transposed ? with.template operator()<true>() : with.template operator()<false>();
}

void combine_device(const LowRankCombine& op) {
  const DType rows = op.rows.defined() ? op.rows.dtype() : op.z.defined() ? op.z.dtype() : op.y.dtype();
  DType matrices = DType::kF32;
  for (const Tensor& m : op.matrices) matrices = m.defined() ? m.dtype() : matrices;
  visit_device_floating("low_rank_combine", rows, [&]<class E>() {
    visit_device_floating("low_rank_combine", matrices, [&]<class W>() { combine<E, W>(op); });
  });
}
const RegisterKernel<LowRankCombine> register_combine{kDevice, &combine_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
