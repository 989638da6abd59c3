#include "kernels/attention_wgmma.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

using namespace attention_wgmma;

constexpr int kKeys = 128;  // of a block
constexpr int kStages = 4;  // tiles of keys or values

struct Sources {
  Source q, k, v;
};
template <int kWidth>
struct Shared {
  Tile<kOwn, kWidth> q;
  Tile<kKeys, kWidth> tile[kStages];
  uint64_t own, full[kStages], free[kStages];
};

#ifdef LIGHTMOE_HOPPER_CODE

// Keys 0, keys 1, values 0, keys 2, values 1, ...: the order in which they are multiplied.
template <int kWidth>
DEVICE_FN void produce(const Sources& from, const AttentionSpan& span, int head, int first, int rows, int blocks,
                       Shared<kWidth>& shared) {
  const int column = head * kWidth;
  bring(shared.q, from.q, span.q_begin + first, column, rows, &shared.own);
  StageRing<kStages> ring;
  const auto next = [&](const Source& source, int block) {
    ptx::mbarrier_wait(&shared.free[ring.stage], ring.parity ^ 1);
    bring(shared.tile[ring.stage], source, span.k_begin + block * kKeys, column, span.k_count - block * kKeys,
          &shared.full[ring.stage]);
    ring.next();
  };
  for (int block = 0; block < blocks; ++block) {
    next(from.k, block);
    if (block > 0) next(from.v, block - 1);
  }
  if (blocks > 0) next(from.v, blocks - 1);
}

// 64 rows; a thread has parts of two. Scores are in units of log2, scaled when they are exponentiated.
template <int kWidth>
struct Consumer {
  const AttentionSizes& n;
  const AttentionSpan& span;
  Shared<kWidth>& shared;
  int head, first, end;  // row of the warp; last row of the block + 1
  float largest[2], sum[2], out[kWidth / 2];

  DEVICE_FN int row(int i) const { return first + lane_id() / 4 + 8 * i; }
  DEVICE_FN int seen(int i) const { return row(i) < end ? span.visible(row(i)) : 0; }

  // Scores become unnormalised probabilities and correction[i] what the sums so far are worth beside them.
  DEVICE_FN void softmax(float (&score)[kKeys / 2], int begin, float (&correction)[2]) {
    const float scale = n.scale * kLog2E;
    const bool whole = first + 16 <= end && begin + kKeys <= span.visible(first);  // all rows of the warp see all keys
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int columns = seen(i) - begin - lane_id() % 4 * 2;
      float top = largest[i];
#pragma unroll
      for (int c = 0; c < kKeys / 4; ++c) {
        float& s = score[c / 2 * 4 + 2 * i + c % 2];
        if (!whole && c / 2 * 8 + c % 2 >= columns) s = -INFINITY;
        top = std::max(top, s);
      }
      top = std::max(top, shuffle_xor(top, 1));
      top = std::max(top, shuffle_xor(top, 2));
      const float shift = shift_of(top) * scale;
      correction[i] = fast_exp2(std::fma(largest[i], scale, -shift));
      largest[i] = top;
      float added = 0;
#pragma unroll
      for (int c = 0; c < kKeys / 4; ++c) {
        float& s = score[c / 2 * 4 + 2 * i + c % 2];
        s = fast_exp2(std::fma(s, scale, -shift));
        added += s;
      }
      sum[i] = std::fma(sum[i], correction[i], added);  // of this thread's columns
    }
  }

  DEVICE_FN void rescale(const float (&correction)[2]) {
#pragma unroll
    for (int c = 0; c < kWidth / 2; ++c) out[c] *= correction[c / 2 % 2];
  }

  // The scores of block b and the products with the values of block b - 1 are on their way together: the softmax of b runs beside the latter.
  DEVICE_FN void multiply(int blocks) {
    const int own_row = warp_id() / 4 * 64 - 64;  // the producers are warps 0 to 3
    float score[kKeys / 2], correction[2];
    uint32_t factors[kKeys / 16][4];
    StageRing<kStages> ring;
    const auto take = [&] {
      const int stage = ring.stage;
      ptx::mbarrier_wait(&shared.full[stage], ring.parity);
      ring.next();
      return stage;
    };
    ptx::mbarrier_wait(&shared.own, 0);
    int keys = take();
    ptx::wgmma_fence_registers(score);
    ptx::wgmma_fence();
    multiply_transposed<kKeys>(score, shared.q, own_row, shared.tile[keys]);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_registers(score);
    release(&shared.free[keys]);
    softmax(score, 0, correction);
    to_factors<kKeys>(factors, score);
    for (int block = 1; block < blocks; ++block) {
      keys = take();
      const int values = take();
      ptx::wgmma_fence_registers(score);
      ptx::wgmma_fence_registers(out);
      ptx::wgmma_fence();
      multiply_transposed<kKeys>(score, shared.q, own_row, shared.tile[keys]);
      ptx::wgmma_commit();
      add_products<kKeys>(out, factors, shared.tile[values]);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::wgmma_fence_registers(score);
      release(&shared.free[keys]);
      softmax(score, block * kKeys, correction);
      ptx::wgmma_wait<0>();
      ptx::wgmma_fence_registers(out);
      release(&shared.free[values]);
      rescale(correction);
      to_factors<kKeys>(factors, score);
    }
    const int values = take();
    ptx::wgmma_fence_registers(out);
    ptx::wgmma_fence();
    add_products<kKeys>(out, factors, shared.tile[values]);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_registers(out);
  }

  DEVICE_FN void store(bf16* to, float* lse) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += shuffle_xor(sum[i], 1);
      sum[i] += shuffle_xor(sum[i], 2);
      if (row(i) >= end) continue;
      const float factor = sum[i] == 0 ? 0.0f : 1 / sum[i];  // no key: 0
      bf16* out_row = to + n.q_offset(span, head, row(i)) + lane_id() % 4 * 2;
#pragma unroll
      for (int c = 0; c < kWidth / 8; ++c)
        store_pair(out_row + 8 * c, out[4 * c + 2 * i] * factor, out[4 * c + 2 * i + 1] * factor);
      if (lane_id() % 4 == 0) lse[n.lse_offset(span, head, row(i))] = largest[i] * n.scale + std::log(sum[i]);
    }
  }
};

#endif

template <int kWidth>
__global__ void __launch_bounds__(kThreads, 1)
    attention_wgmma_kernel(const __grid_constant__ Sources from, bf16* out, float* lse, AttentionSizes n) {
#ifdef LIGHTMOE_HOPPER_CODE
  const SequenceTile at =
      find_tile(n.sequences, static_cast<int>(blockIdx.x), [&](int s) { return ceil_div(n.rows(s), int{kOwn}); });
  if (at.sequence < 0) return;
  const AttentionSpan span = n.span(at.sequence);
  const int head = static_cast<int>(blockIdx.y);
  const int first = (ceil_div(span.queries, int{kOwn}) - 1 - at.tile) * kOwn;  // long ones first
  const int end = std::min(first + kOwn, span.queries), blocks = ceil_div(span.visible(end - 1), int{kKeys});
  auto& shared = shared_memory<Shared<kWidth>>();
  prepare_barriers(&shared.own, shared.full, shared.free);
  if (threadIdx.x < kWarpgroup) {
    ptx::decrease_registers<kProducerRegisters>();
    if (blocks > 0) produce(from, span, head, first, end - first, blocks, shared);
  } else {
    ptx::increase_registers<kConsumerRegisters>();
    Consumer<kWidth> rows{n, span, shared, head, first + warp_id() * 16 - 64, end, {-INFINITY, -INFINITY}, {}, {}};
    if (blocks > 0) rows.multiply(blocks);
    rows.store(out, lse);
  }
#endif
}

template <int kWidth>
void launch_wgmma(const Attention& op, const AttentionSizes& n) {
  const Sources from{source_of(op.q, kOwn), source_of(op.k, kKeys), source_of(op.v, kKeys)};
  launch<attention_wgmma_kernel<kWidth>>(
      {.blocks = {n.row_tiles(kOwn), uint32_t(n.heads)}, .threads = {kThreads}, .shared_bytes = sizeof(Shared<kWidth>)},
      from, op.out.data<bf16>(), op.lse.data<float>(), n);
}

}  // namespace

bool launch_attention_wgmma(const Attention& op, const AttentionSizes& n) {
  if (!op.lse.defined() || !takes(op.head_dim, n, {&op.q, &op.k, &op.v, &op.out})) return false;
  op.head_dim == 64 ? launch_wgmma<64>(op, n) : launch_wgmma<128>(op, n);
  return true;
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
