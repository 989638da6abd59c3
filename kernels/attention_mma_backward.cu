#include "kernels/attention_mma.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

// The two passes of attention_backward.cu are one kernel here. A warp OWNS 16 keys (dk, dv) or 16 rows (dq) and goes through the OTHERS,
// rows or keys, 32 at a time. With own = (k, v) and other = (q, dout), or the reverse:
//   s = own0 other0^T,  dp = own1 other1^T,  p = exp(scale s - lse),  ds = p (dp - delta),  own0's gradient += scale ds other0,
//   and for keys dv += p other1.  p and ds are rounded to bf16 before they multiply.
constexpr int kOwn = 64, kOther = 32, kThreads = 128;

struct RowOf {
  float lse, delta;
  int seen;  // keys
};

template <int kWidth>
struct MmaBackwardTiles {
  bf16 own[2][kOwn][kWidth + 8], other[2][2][kOther][kWidth + 8];
  RowOf row[2][kOther];
};

struct MmaBackwardArguments {
  const bf16 *q, *k, *v, *dout;
  const float *lse, *delta;
  bf16 *dq, *dk, *dv;
};

template <bool kOwnKeys, int kWidth>
struct MmaBackwardTile {
  static constexpr int kScores = kOther / 8, kOut = kWidth / 8;
  const MmaBackwardArguments& from;
  const AttentionSizes& n;
  const AttentionSpan& span;
  MmaBackwardTiles<kWidth>& shared;
  int kv_head, first;  // of the block's own keys or rows
  float grad[kOut][4], grad_v[kOwnKeys ? kOut : 1][4];
  RowOf mine[2];  // if rows are owned

  DEVICE_FN int rows() const { return span.queries * n.group; }
  DEVICE_FN int own(int i) const { return first + warp_id() * 16 + lane_id() / 4 + 8 * i; }
  DEVICE_FN RowOf row_of(int row) const {
    if (row >= rows()) return {0, 0, 0};
    const int64_t at = n.lse_offset(span, kv_head, row);
    return {from.lse[at], from.delta[at], span.visible(row / n.group)};
  }
  template <int kRows>
  DEVICE_FN void copy_keys(int begin, bf16 (*k)[kWidth + 8], bf16 (*v)[kWidth + 8]) const {
    const int count = std::min(int{kRows}, span.k_count - begin);
    const auto at = [&](int r) { return n.k_offset(span, kv_head, begin + r); };
    copy_rows<kRows>(from.k, count, k, at);
    copy_rows<kRows>(from.v, count, v, at);
  }
  template <int kRows>
  DEVICE_FN void copy_queries(int begin, bf16 (*q)[kWidth + 8], bf16 (*dout)[kWidth + 8]) const {
    const int count = std::min(int{kRows}, rows() - begin);
    const auto at = [&](int r) { return n.q_offset(span, kv_head, begin + r); };
    copy_rows<kRows>(from.q, count, q, at);
    copy_rows<kRows>(from.dout, count, dout, at);
  }

  DEVICE_FN void load_own() {
    if constexpr (kOwnKeys) {
      copy_keys<kOwn>(first, shared.own[0], shared.own[1]);
    } else {
      copy_queries<kOwn>(first, shared.own[0], shared.own[1]);
      mine[0] = row_of(own(0)), mine[1] = row_of(own(1));
    }
  }
  DEVICE_FN void load_other(int begin, int stage) {
    if constexpr (kOwnKeys) {
      copy_queries<kOther>(begin, shared.other[stage][0], shared.other[stage][1]);
      const int thread = static_cast<int>(threadIdx.x);
      if (thread < kOther) shared.row[stage][thread] = row_of(begin + thread);
    } else {
      copy_keys<kOther>(begin, shared.other[stage][0], shared.other[stage][1]);
    }
  }

  DEVICE_FN void block(int begin, int stage) {
    const auto& other = shared.other[stage];
    const int warp_row = warp_id() * 16, column = lane_id() % 4 * 2;
    float p[kScores][4] = {}, ds[kScores][4] = {};
#pragma unroll
    for (int d = 0; d < kWidth; d += 16) {
      uint32_t a[2][4];
      load_a(a[0], shared.own[0], warp_row, d);
      load_a(a[1], shared.own[1], warp_row, d);
#pragma unroll
      for (int j = 0; j < kScores; j += 2) {
        multiply_transposed(p + j, a[0], other[0], 8 * j, d);
        multiply_transposed(ds + j, a[1], other[1], 8 * j, d);
      }
    }
#pragma unroll
    for (int e = 0; e < kScores * 4; ++e) {
      const int i = e % 4 / 2, at = e / 4 * 8 + column + e % 2;
      const RowOf row = kOwnKeys ? shared.row[stage][at] : mine[i];
      const int key = kOwnKeys ? own(i) : begin + at;
      float &probability = p[e / 4][e % 4], &gradient = ds[e / 4][e % 4];
      probability = key < row.seen ? fast_exp(probability * n.scale - row.lse) : 0.0f;
      gradient = probability * (gradient - row.delta);
    }
#pragma unroll
    for (int j = 0; j < kScores; j += 2) {
      add_products(grad, ds + j, other[0], 8 * j);
      if constexpr (kOwnKeys) add_products(grad_v, p + j, other[1], 8 * j);
    }
  }

  DEVICE_FN void store() const {
    const int column = lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (own(i) >= (kOwnKeys ? span.k_count : rows())) continue;
      const int64_t at = (kOwnKeys ? n.k_offset(span, kv_head, own(i)) : n.q_offset(span, kv_head, own(i))) + column;
#pragma unroll
      for (int c = 0; c < kOut; ++c) {
        store_pair((kOwnKeys ? from.dk : from.dq) + at + 8 * c, grad[c][2 * i] * n.scale, grad[c][2 * i + 1] * n.scale);
        if constexpr (kOwnKeys) store_pair(from.dv + at + 8 * c, grad_v[c][2 * i], grad_v[c][2 * i + 1]);
      }
    }
  }
};

template <bool kOwnKeys, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    attention_mma_backward_kernel(MmaBackwardArguments from, AttentionSizes n) {
  const SequenceTile at = find_tile(n.sequences, static_cast<int>(blockIdx.x),
                                    [&](int s) { return ceil_div(kOwnKeys ? n.k_count[s] : n.rows(s), int{kOwn}); });
  if (at.sequence < 0) return;
  const AttentionSpan span = n.span(at.sequence);
  const int rows = n.rows(at.sequence);
  // The blocks with most to do first: the first keys, the last rows.
  const int first = (kOwnKeys ? at.tile : ceil_div(rows, int{kOwn}) - 1 - at.tile) * kOwn;
  const int last = std::min(first + kOwn, rows) - 1;
  const int begin = kOwnKeys ? std::max(0, first - span.q_pos) * n.group : 0;  // queries before see none of these keys
  const int end = kOwnKeys ? rows : span.visible(last / n.group);
  auto& shared = shared_memory<MmaBackwardTiles<kWidth>>();
  MmaBackwardTile<kOwnKeys, kWidth> tile{from, n, span, shared, static_cast<int>(blockIdx.y), first, {}, {}, {}};
  tile.load_own();
  if (begin < end) tile.load_other(begin, 0);
  ptx::cp_async_commit();
  int stage = 0;
  for (int other = begin; other < end; other += kOther, stage ^= 1) {
    if (other + kOther < end) tile.load_other(other + kOther, stage ^ 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    sync_block();
    tile.block(other, stage);
    sync_block();  // the next copies go to where this block lies
  }
  ptx::cp_async_wait<0>();
  tile.store();
}

template <int kWidth>
void launch_passes(const MmaBackwardArguments& from, const AttentionSizes& n, int64_t keys) {
  const auto key_tiles = static_cast<uint32_t>(keys / kOwn + n.sequences);
  launch<attention_mma_backward_kernel<true, kWidth>>({.blocks = {key_tiles, uint32_t(n.kv_heads)},
                                                       .threads = {kThreads},
                                                       .shared_bytes = sizeof(MmaBackwardTiles<kWidth>)},
                                                      from, n);
  launch<attention_mma_backward_kernel<false, kWidth>>({.blocks = {n.row_tiles(kOwn), uint32_t(n.kv_heads)},
                                                        .threads = {kThreads},
                                                        .shared_bytes = sizeof(MmaBackwardTiles<kWidth>)},
                                                       from, n);
}

}  // namespace

bool launch_attention_backward_mma(const AttentionBackward& op, const AttentionSizes& n, const Tensor& delta) {
  if (!takes_mma(op.head_dim, op.q, op.k, op.v, op.dout, op.dq, op.dk, op.dv)) return false;
  const MmaBackwardArguments from{.q = op.q.data<bf16>(),
                                  .k = op.k.data<bf16>(),
                                  .v = op.v.data<bf16>(),
                                  .dout = op.dout.data<bf16>(),
                                  .lse = op.lse.data<float>(),
                                  .delta = delta.data<float>(),
                                  .dq = op.dq.data<bf16>(),
                                  .dk = op.dk.data<bf16>(),
                                  .dv = op.dv.data<bf16>()};
  op.head_dim == 64 ? launch_passes<64>(from, n, op.k.dim(0)) : launch_passes<128>(from, n, op.k.dim(0));
  return true;
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
