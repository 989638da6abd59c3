#include "kernels/attention_device.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

// Two passes that both recompute the probabilities from lse, so that no sum is shared between blocks: a block of keys goes through all
// rows that see it (dk, dv), and a block of rows through all keys it sees (dq). 14 instead of 10 multiply-adds, and one fixed order.
template <int kRows, int kKeys, int kWidth>
struct BackwardTiles {
  float q[kRows][kWidth + 4], dout[kRows][kWidth + 4];
  float keys[kKeys][kWidth + 4], values[kKeys][kWidth + 4];
  float p[kRows][kKeys + 4], ds[kRows][kKeys + 4];
};

struct BackwardInputs {
  Elements q, k, v, dout;
  const float *lse, *delta;  // [H, Tq]
};

// delta = <out, dout>, by one warp for each query and head.
__global__ void __launch_bounds__(256)
    attention_delta_kernel(Elements out, Elements dout, float* delta, int queries, int heads, int head_dim) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + warp_id();
  if (row >= static_cast<int64_t>(queries) * heads) return;
  float sum = 0;
  for (int d = lane_id() * 8; d < head_dim; d += 256) {
    const auto a = out.load(row * head_dim, d, head_dim), b = dout.load(row * head_dim, d, head_dim);
#pragma unroll
    for (int c = 0; c < 8; ++c) sum += a[c] * b[c];
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) delta[row % heads * queries + row / heads] = sum;
}

template <int kRows, int kKeys, int kWidth>
struct BackwardTile {
  static constexpr int kR = kRows / 16, kK = kKeys / 16;
  const BackwardInputs& from;
  const AttentionSizes& n;
  const AttentionSpan& span;
  BackwardTiles<kRows, kKeys, kWidth>& shared;
  int kv_head, ty, tx;

  DEVICE_FN int rows() const { return span.queries * n.group; }
  DEVICE_FN void load_rows(int first) {
    const int count = std::min(int{kRows}, rows() - first);
    const auto at = [&](int r) { return n.q_offset(span, kv_head, first + r); };
    load_tile<kRows, kWidth>(from.q, count, n.head_dim, n.scale, shared.q, at);
    load_tile<kRows, kWidth>(from.dout, count, n.head_dim, 1.0f, shared.dout, at);
  }
  DEVICE_FN void load_keys(int first) {
    const int count = std::min(int{kKeys}, span.k_count - first);
    const auto at = [&](int r) { return n.k_offset(span, kv_head, first + r); };
    load_tile<kKeys, kWidth>(from.k, count, n.head_dim, 1.0f, shared.keys, at);
    load_tile<kKeys, kWidth>(from.v, count, n.head_dim, 1.0f, shared.values, at);
  }

  // shared.p and shared.ds of the loaded rows against the loaded keys; 0 where a key is not seen.
  DEVICE_FN void scores(int first_row, int first_key) {
    float s[kR][kK], dp[kR][kK];
    multiply_rows<kR, kK, kWidth + 4>(shared.q + ty * kR, shared.keys + tx, n.head_dim, s);
    multiply_rows<kR, kK, kWidth + 4>(shared.dout + ty * kR, shared.values + tx, n.head_dim, dp);
#pragma unroll
    for (int i = 0; i < kR; ++i) {
      const int row = first_row + ty * kR + i;
      const bool owned = row < rows();
      const int seen = owned ? span.visible(row / n.group) - first_key : 0;
      const int64_t at = owned ? n.lse_offset(span, kv_head, row) : 0;
      const float lse = owned ? from.lse[at] : 0.0f, delta = owned ? from.delta[at] : 0.0f;
#pragma unroll
      for (int j = 0; j < kK; ++j) {
        const float p = tx + 16 * j < seen ? fast_exp(s[i][j] - lse) : 0.0f;
        shared.p[ty * kR + i][tx + 16 * j] = p;
        shared.ds[ty * kR + i][tx + 16 * j] = p * (dp[i][j] - delta);
      }
    }
  }

  template <int kC>
  DEVICE_FN void store(const Elements& to, int64_t at, float factor, const float (&values)[kC]) const {
#pragma unroll
    for (int c = 0; c < kC; c += 4) {
      const Floats<4> four{values[c] * factor, values[c + 1] * factor, values[c + 2] * factor, values[c + 3] * factor};
      to.store(at, 16 * c + tx * 4, n.head_dim, four);
    }
  }
};

template <int kRows, int kKeys, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_dkv_kernel(BackwardInputs from, Elements dk, Elements dv, AttentionSizes n) {
  const SequenceTile at =
      find_tile(n.sequences, static_cast<int>(blockIdx.x), [&](int s) { return ceil_div(n.k_count[s], int{kKeys}); });
  if (at.sequence < 0) return;
  constexpr int kK = kKeys / 16, kC = kWidth / 16;
  const AttentionSpan span = n.span(at.sequence);
  const int kv_head = static_cast<int>(blockIdx.y), first_key = at.tile * kKeys;
  auto& shared = shared_memory<BackwardTiles<kRows, kKeys, kWidth>>();
  const int ty = static_cast<int>(threadIdx.x) / 16, tx = static_cast<int>(threadIdx.x) % 16;
  BackwardTile<kRows, kKeys, kWidth> tile{from, n, span, shared, kv_head, ty, tx};
  tile.load_keys(first_key);
  float dk_sum[kK][kC] = {}, dv_sum[kK][kC] = {};
  // Queries before this one see none of these keys.
  const int first_query = std::max(0, first_key - span.q_pos);
  for (int first = first_query * n.group; first < tile.rows(); first += kRows) {
    sync_block();  // the rows before may still be read
    tile.load_rows(first);
    sync_block();
    tile.scores(first, first_key);
    sync_block();
    add_rows<kK, kC, kWidth + 4>(kRows, shared.dout, tx * 4, dv_sum,
                                 [&](int i, int r) { return shared.p[r][ty * kK + i]; });
    add_rows<kK, kC, kWidth + 4>(kRows, shared.q, tx * 4, dk_sum,  // q carries the scale already
                                 [&](int i, int r) { return shared.ds[r][ty * kK + i]; });
  }
#pragma unroll
  for (int i = 0; i < kK; ++i) {
    const int key = first_key + ty * kK + i;
    if (key >= span.k_count) continue;
    tile.store(dk, n.k_offset(span, kv_head, key), 1.0f, dk_sum[i]);
    tile.store(dv, n.k_offset(span, kv_head, key), 1.0f, dv_sum[i]);
  }
}

template <int kRows, int kKeys, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_dq_kernel(BackwardInputs from, Elements dq, AttentionSizes n) {
  const SequenceTile at =
      find_tile(n.sequences, static_cast<int>(blockIdx.x), [&](int s) { return ceil_div(n.rows(s), int{kRows}); });
  if (at.sequence < 0) return;
  constexpr int kR = kRows / 16, kC = kWidth / 16;
  const AttentionSpan span = n.span(at.sequence);
  const int rows = n.rows(at.sequence), kv_head = static_cast<int>(blockIdx.y);
  const int first = (ceil_div(rows, int{kRows}) - 1 - at.tile) * kRows;  // long ones first
  const int last = std::min(first + kRows, rows) - 1, end = span.visible(last / n.group);
  auto& shared = shared_memory<BackwardTiles<kRows, kKeys, kWidth>>();
  const int ty = static_cast<int>(threadIdx.x) / 16, tx = static_cast<int>(threadIdx.x) % 16;
  BackwardTile<kRows, kKeys, kWidth> tile{from, n, span, shared, kv_head, ty, tx};
  tile.load_rows(first);
  float sum[kR][kC] = {};
  for (int first_key = 0; first_key < end; first_key += kKeys) {
    sync_block();  // the keys before may still be read
    tile.load_keys(first_key);
    sync_block();
    tile.scores(first, first_key);
    sync_block();
    add_rows<kR, kC, kWidth + 4>(kKeys, shared.keys, tx * 4, sum,
                                 [&](int i, int key) { return shared.ds[ty * kR + i][key]; });
  }
#pragma unroll
  for (int i = 0; i < kR; ++i) {
    const int row = first + ty * kR + i;
    if (row < rows) tile.store(dq, n.q_offset(span, kv_head, row), n.scale, sum[i]);
  }
}

template <int kRows, int kKeys, int kWidth>
void launch_dkv(const AttentionBackward& op, const BackwardInputs& from, const AttentionSizes& n) {
  const auto tiles = static_cast<uint32_t>(op.k.dim(0) / kKeys + n.sequences);
  launch<attention_dkv_kernel<kRows, kKeys, kWidth>>({.blocks = {tiles, uint32_t(n.kv_heads)},
                                                      .threads = {kAttentionThreads},
                                                      .shared_bytes = sizeof(BackwardTiles<kRows, kKeys, kWidth>)},
                                                     from, elements_of("attention_backward", op.dk, op.head_dim),
                                                     elements_of("attention_backward", op.dv, op.head_dim), n);
}
template <int kRows, int kKeys, int kWidth>
void launch_dq(const AttentionBackward& op, const BackwardInputs& from, const AttentionSizes& n) {
  launch<attention_dq_kernel<kRows, kKeys, kWidth>>({.blocks = {n.row_tiles(kRows), uint32_t(n.kv_heads)},
                                                     .threads = {kAttentionThreads},
                                                     .shared_bytes = sizeof(BackwardTiles<kRows, kKeys, kWidth>)},
                                                    from, elements_of("attention_backward", op.dq, op.head_dim), n);
}

void backward_device(const AttentionBackward& op) {
  const AttentionSizes n(op);
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor delta = Tensor::empty(op.lse.shape(), DType::kF32, kDevice);
  const auto elements = [&](const Tensor& t) { return elements_of("attention_backward", t, op.head_dim); };
  const BackwardInputs from{.q = elements(op.q),
                            .k = elements(op.k),
                            .v = elements(op.v),
                            .dout = elements(op.dout),
                            .lse = op.lse.data<float>(),
                            .delta = delta.data<float>()};
  op.dk.fill_zero(), op.dv.fill_zero();  // rows that no sequence owns
  launch<attention_delta_kernel>({.blocks = {static_cast<uint32_t>(ceil_div(delta.numel(), 8))}, .threads = {256}},
                                 elements(op.out), from.dout, delta.data<float>(), n.queries, n.heads, n.head_dim);
  if (attention_takes_wgmma() && launch_attention_backward_wgmma(op, n, delta)) return;
  if (launch_attention_backward_mma(op, n, delta)) return;
  visit_head_width("attention_backward", op.head_dim, [&]<int kWidth>() {
    constexpr int kFew = kWidth <= 128 ? 32 : 16;  // shared memory holds half as many wide rows
    launch_dkv<kFew, 2 * kFew, kWidth>(op, from, n);
    launch_dq<2 * kFew, kFew, kWidth>(op, from, n);
  });
}
const RegisterKernel<AttentionBackward> register_backward{kDevice, &backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
