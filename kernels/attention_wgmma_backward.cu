#include "kernels/attention_wgmma.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

using namespace attention_wgmma;

// The two passes of attention_mma_backward.cu: a block OWNS 128 keys (dk, dv) or 128 rows (dq), 64 a warpgroup, and goes through the OTHERS,
// rows or keys, 64 at a time. With own = (k, v) and other = (q, dout), or the reverse:
//   s = own0 other0^T,  dp = own1 other1^T,  p = exp(scale s - lse),  ds = p (dp - delta),  own0's gradient += scale ds other0,
//   and for keys dv += p other1.  p and ds are rounded to bf16 and multiply from registers.
constexpr int kOther = 64, kStages = 4;

struct Sources {
  Source own[2], other[2];
};
struct Arguments {
  const float *lse, *delta;
  bf16 *grad, *grad_v;  // of what is owned: dk and dv, or dq
};
struct alignas(16) RowOf {
  float lse, delta;  // lse in units of log2
  int seen;          // keys
};
template <int kWidth>
struct Shared {
  Tile<kOwn, kWidth> own[2];
  Tile<kOther, kWidth> other[kStages][2];
  RowOf row[kStages][kOther];
  uint64_t own_full, full[kStages], free[kStages];
};

#ifdef LIGHTMOE_HOPPER_CODE

DEVICE_FN RowOf row_of(const Arguments& to, const AttentionSizes& n, const AttentionSpan& span, int head, int row) {
  if (row >= span.queries) return {0, 0, 0};
  const int64_t at = n.lse_offset(span, head, row);
  return {to.lse[at] * kLog2E, to.delta[at], span.visible(row)};
}

struct Extent {                  // in rows or keys of the sequence
  int first, count, begin, end;  // owned ones, of the others those that matter
};

template <bool kOwnKeys, int kWidth>
DEVICE_FN void produce(const Sources& from, const Arguments& to, const AttentionSizes& n, const AttentionSpan& span,
                       int head, const Extent& extent, Shared<kWidth>& shared) {
  const int own_begin = kOwnKeys ? span.k_begin : span.q_begin, other_begin = kOwnKeys ? span.q_begin : span.k_begin;
  const int others = kOwnKeys ? span.queries : span.k_count, thread = static_cast<int>(threadIdx.x);
  const int column = head * kWidth;
  bring(shared.own, from.own[0], from.own[1], own_begin + extent.first, column, extent.count, &shared.own_full);
  StageRing<kStages> ring;
  for (int begin = extent.begin; begin < extent.end; begin += kOther, ring.next()) {
    ptx::mbarrier_wait(&shared.free[ring.stage], ring.parity ^ 1);
    if constexpr (kOwnKeys) {
      if (thread < kOther) shared.row[ring.stage][thread] = row_of(to, n, span, head, begin + thread);
      ptx::barrier_sync(kProducerBarrier, kWarpgroup);
    }
    bring(shared.other[ring.stage], from.other[0], from.other[1], other_begin + begin, column, others - begin,
          &shared.full[ring.stage]);
  }
}

template <bool kOwnKeys, int kWidth>
struct Consumer {
  const AttentionSizes& n;
  Shared<kWidth>& shared;
  int first;      // own row or key of the warp
  RowOf mine[2];  // if rows are owned
  float grad[kWidth / 2], grad_v[kOwnKeys ? kWidth / 2 : 2];

  DEVICE_FN int own(int i) const { return first + lane_id() / 4 + 8 * i; }

  // s becomes p and dp becomes ds.
  DEVICE_FN void differentiate(float (&s)[kOther / 2], float (&dp)[kOther / 2], int begin, int stage) const {
    const float scale = n.scale * kLog2E;
#pragma unroll
    for (int j = 0; j < kOther / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int at = 8 * j + lane_id() % 4 * 2 + c;
        RowOf other{};
        if constexpr (kOwnKeys) other = shared.row[stage][at];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const RowOf& row = kOwnKeys ? other : mine[i];
          const int key = kOwnKeys ? own(i) : begin + at;
          float &probability = s[4 * j + 2 * i + c], &gradient = dp[4 * j + 2 * i + c];
          probability = key < row.seen ? fast_exp2(std::fma(probability, scale, -row.lse)) : 0.0f;
          gradient = probability * (gradient - row.delta);
        }
      }
    }
  }

  DEVICE_FN void multiply(const Extent& extent) {
    const int own_row = warp_id() / 4 * 64 - 64;  // the producers are warps 0 to 3
    float s[kOther / 2], dp[kOther / 2];
    uint32_t p_factors[kOther / 16][4], ds_factors[kOther / 16][4];
    StageRing<kStages> ring;
    ptx::mbarrier_wait(&shared.own_full, 0);
    for (int begin = extent.begin; begin < extent.end; begin += kOther, ring.next()) {
      const auto& other = shared.other[ring.stage];
      ptx::mbarrier_wait(&shared.full[ring.stage], ring.parity);
      ptx::wgmma_fence_registers(s);
      ptx::wgmma_fence_registers(dp);
      ptx::wgmma_fence();
      multiply_transposed<kOther>(s, shared.own[0], own_row, other[0]);
      multiply_transposed<kOther>(dp, shared.own[1], own_row, other[1]);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_fence_registers(s);
      ptx::wgmma_fence_registers(dp);
      differentiate(s, dp, begin, ring.stage);
      to_factors<kOther>(ds_factors, dp);
      ptx::wgmma_fence_registers(grad);
      if constexpr (kOwnKeys) {
        to_factors<kOther>(p_factors, s);
        ptx::wgmma_fence_registers(grad_v);
      }
      ptx::wgmma_fence();
      add_products<kOther>(grad, ds_factors, other[0]);
      if constexpr (kOwnKeys) add_products<kOther>(grad_v, p_factors, other[1]);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_fence_registers(grad);
      if constexpr (kOwnKeys) ptx::wgmma_fence_registers(grad_v);
      release(&shared.free[ring.stage]);
    }
  }

  DEVICE_FN void store(const Arguments& to, const AttentionSpan& span, int head, const Extent& extent) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (own(i) >= extent.first + extent.count) continue;
      const int64_t at =
          (kOwnKeys ? n.k_offset(span, head, own(i)) : n.q_offset(span, head, own(i))) + lane_id() % 4 * 2;
#pragma unroll
      for (int c = 0; c < kWidth / 8; ++c) {
        const int e = 4 * c + 2 * i;
        store_pair(to.grad + at + 8 * c, grad[e] * n.scale, grad[e + 1] * n.scale);
        if constexpr (kOwnKeys) store_pair(to.grad_v + at + 8 * c, grad_v[e], grad_v[e + 1]);
      }
    }
  }
};

#endif

template <bool kOwnKeys, int kWidth>
__global__ void __launch_bounds__(kThreads, 1)
    attention_wgmma_backward_kernel(const __grid_constant__ Sources from, Arguments to, AttentionSizes n) {
#ifdef LIGHTMOE_HOPPER_CODE
  const SequenceTile at = find_tile(n.sequences, static_cast<int>(blockIdx.x),
                                    [&](int s) { return ceil_div(kOwnKeys ? n.k_count[s] : n.rows(s), int{kOwn}); });
  if (at.sequence < 0) return;
  const AttentionSpan span = n.span(at.sequence);
  const int head = static_cast<int>(blockIdx.y), all = kOwnKeys ? span.k_count : span.queries;
  // The blocks with most to do first: the first keys, the last rows.
  const int first = (kOwnKeys ? at.tile : ceil_div(all, int{kOwn}) - 1 - at.tile) * kOwn;
  const int count = std::min(all - first, int{kOwn});
  const Extent extent{first, count, kOwnKeys ? std::max(0, first - span.q_pos) : 0,  // queries before see none of them
                      kOwnKeys ? span.queries : span.visible(first + count - 1)};
  auto& shared = shared_memory<Shared<kWidth>>();
  prepare_barriers(&shared.own_full, shared.full, shared.free);
  const bool any = extent.begin < extent.end;
  if (threadIdx.x < kWarpgroup) {
    ptx::decrease_registers<kProducerRegisters>();
    if (any) produce<kOwnKeys>(from, to, n, span, head, extent, shared);
  } else {
    ptx::increase_registers<kConsumerRegisters>();
    Consumer<kOwnKeys, kWidth> own{n, shared, first + warp_id() * 16 - 64, {}, {}, {}};
    if constexpr (!kOwnKeys) {
      for (int i = 0; i < 2; ++i) own.mine[i] = row_of(to, n, span, head, own.own(i));
    }
    if (any) own.multiply(extent);
    own.store(to, span, head, extent);
  }
#endif
}

template <int kWidth>
void launch_passes(const AttentionBackward& op, const AttentionSizes& n, const float* delta) {
  const Tensor *own[2] = {&op.k, &op.v}, *other[2] = {&op.q, &op.dout};
  const auto sources = [](const Tensor* const(&o)[2], const Tensor* const(&t)[2]) {
    return Sources{{source_of(*o[0], kOwn), source_of(*o[1], kOwn)},
                   {source_of(*t[0], kOther), source_of(*t[1], kOther)}};
  };
  const float* lse = op.lse.data<float>();
  const Arguments of_keys{lse, delta, op.dk.data<bf16>(), op.dv.data<bf16>()};
  const Arguments of_rows{lse, delta, op.dq.data<bf16>(), nullptr};
  const auto key_tiles = static_cast<uint32_t>(op.k.dim(0) / kOwn + n.sequences);
  launch<attention_wgmma_backward_kernel<true, kWidth>>(
      {.blocks = {key_tiles, uint32_t(n.heads)}, .threads = {kThreads}, .shared_bytes = sizeof(Shared<kWidth>)},
      sources(own, other), of_keys, n);
  launch<attention_wgmma_backward_kernel<false, kWidth>>(
      {.blocks = {n.row_tiles(kOwn), uint32_t(n.heads)}, .threads = {kThreads}, .shared_bytes = sizeof(Shared<kWidth>)},
      sources(other, own), of_rows, n);
}

}  // namespace

bool launch_attention_backward_wgmma(const AttentionBackward& op, const AttentionSizes& n, const Tensor& delta) {
  if (!takes(op.head_dim, n, {&op.q, &op.k, &op.v, &op.dout, &op.dq, &op.dk, &op.dv})) return false;
  const float* d = delta.data<float>();
  op.head_dim == 64 ? launch_passes<64>(op, n, d) : launch_passes<128>(op, n, d);
  return true;
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
