#include "kernels/attention_mma.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

// A warp owns 16 rows; scores and outputs stay in its registers as fragments. Blocks, parts and merges are those of attention.cu.
// Probabilities are rounded to bf16 before they multiply the values; their sum is not.
template <int kWarps, int kWidth>
struct MmaTiles {
  bf16 q[16 * kWarps][kWidth + 8], keys[2][kAttentionKeys][kWidth + 8], values[2][kAttentionKeys][kWidth + 8];
};

template <int kWarps, int kWidth>
struct MmaTile {
  static constexpr int kScores = kAttentionKeys / 8, kOut = kWidth / 8;  // fragments of 8 columns
  const AttentionSizes& n;
  const AttentionSpan& span;
  MmaTiles<kWarps, kWidth>& shared;
  int kv_head, first;  // row of the warp
  Running part[2], total[2];
  float out[kOut][4], total_out[kOut][4];

  DEVICE_FN int row(int i) const { return first + lane_id() / 4 + 8 * i; }
  DEVICE_FN bool owns(int i) const { return row(i) < span.queries * n.group; }
  DEVICE_FN int seen(int i) const { return owns(i) ? span.visible(row(i) / n.group) : 0; }

  DEVICE_FN void start_part() {
    part[0] = part[1] = Running();
#pragma unroll
    for (int c = 0; c < kOut * 4; ++c) out[c / 4][c % 4] = 0;
  }
  DEVICE_FN void merge_part() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Merge merge(total[i], part[i]);
#pragma unroll
      for (int c = 0; c < kOut * 2; ++c) {
        float& sum = total_out[c / 2][2 * i + c % 2];
        sum = merge(sum, out[c / 2][2 * i + c % 2]);
      }
    }
  }

  DEVICE_FN void load_block(const bf16* k, const bf16* v, int begin) {
    const int count = std::min(int{kAttentionKeys}, span.k_count - begin), stage = begin / kAttentionKeys % 2;
    const auto at = [&](int r) { return n.k_offset(span, kv_head, begin + r); };
    copy_rows<kAttentionKeys>(k, count, shared.keys[stage], at);
    copy_rows<kAttentionKeys>(v, count, shared.values[stage], at);
  }

  DEVICE_FN void multiply_keys(int stage, float (&score)[kScores][4]) {
#pragma unroll
    for (int c = 0; c < kScores * 4; ++c) score[c / 4][c % 4] = 0;
#pragma unroll
    for (int d = 0; d < kWidth; d += 16) {
      uint32_t a[4];
      load_a(a, shared.q, warp_id() * 16, d);
#pragma unroll
      for (int j = 0; j < kScores; j += 2) multiply_transposed(score + j, a, shared.keys[stage], 8 * j, d);
    }
  }

  // Scores become unnormalised probabilities; what was summed before is scaled to the new maximum.
  DEVICE_FN void softmax_block(float (&score)[kScores][4], int begin) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int columns = seen(i) - begin - lane_id() % 4 * 2;
      float largest = part[i].largest, sum = 0;
#pragma unroll
      for (int c = 0; c < kScores * 2; ++c) {
        float& s = score[c / 2][2 * i + c % 2];
        s = c / 2 * 8 + c % 2 < columns ? s * n.scale : -INFINITY;
        largest = std::max(largest, s);
      }
      largest = std::max(largest, shuffle_xor(largest, 1));
      largest = std::max(largest, shuffle_xor(largest, 2));
      const float shift = shift_of(largest), correction = fast_exp(part[i].largest - shift);
#pragma unroll
      for (int c = 0; c < kScores * 2; ++c) {
        float& s = score[c / 2][2 * i + c % 2];
        s = fast_exp(s - shift);
        sum += s;
      }
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      part[i].largest = largest;
      part[i].sum = std::fma(part[i].sum, correction, sum);
#pragma unroll
      for (int c = 0; c < kOut * 2; ++c) out[c / 2][2 * i + c % 2] *= correction;
    }
  }

  DEVICE_FN void key_block(int begin) {
    const int stage = begin / kAttentionKeys % 2;
    float score[kScores][4];
    multiply_keys(stage, score);
    softmax_block(score, begin);
#pragma unroll
    for (int j = 0; j < kScores; j += 2) add_products(out, score + j, shared.values[stage], 8 * j);
  }

  DEVICE_FN void store(const AttentionResult& to, int i, const Running& sums, const float (&values)[kOut][4],
                       int part_index) const {
    const int64_t at = n.q_offset(span, kv_head, row(i)), slot = at / kWidth * to.parts + part_index;
    const int column = lane_id() % 4 * 2;
    const float factor = sums.sum == 0 ? 0.0f : 1 / sums.sum;  // no key: 0
    bf16* out_row = static_cast<bf16*>(const_cast<void*>(to.out.data)) + at;
#pragma unroll
    for (int c = 0; c < kOut; ++c) {
      const float first_value = values[c][2 * i], second = values[c][2 * i + 1];
      if (to.part_out == nullptr) {
        store_pair(out_row + 8 * c + column, first_value * factor, second * factor);
      } else {
        float* to_part = to.part_out + slot * kWidth + 8 * c + column;
        to_part[0] = first_value, to_part[1] = second;
      }
    }
    if (column != 0) return;
    if (to.part_out != nullptr) to.part_of[2 * slot] = sums.largest, to.part_of[2 * slot + 1] = sums.sum;
    if (to.part_out == nullptr && to.lse != nullptr) {
      to.lse[n.lse_offset(span, kv_head, row(i))] = sums.largest + std::log(sums.sum);
    }
  }
};

template <int kWarps, int kWidth>
__global__ void __launch_bounds__(32 * kWarps)
    attention_mma_kernel(const bf16* q, const bf16* k, const bf16* v, AttentionResult to, AttentionSizes n) {
  constexpr int kRows = 16 * kWarps;
  const SequenceTile at =
      find_tile(n.sequences, static_cast<int>(blockIdx.x), [&](int s) { return ceil_div(n.rows(s), int{kRows}); });
  if (at.sequence < 0) return;
  const AttentionSpan span = n.span(at.sequence);
  const int rows = n.rows(at.sequence), kv_head = static_cast<int>(blockIdx.y);
  const int first = (ceil_div(rows, int{kRows}) - 1 - at.tile) * kRows;  // long ones first
  const int last = std::min(first + kRows, rows) - 1, end = span.visible(last / n.group);
  const bool one_part = to.part_out != nullptr;
  const int part = static_cast<int>(blockIdx.z);
  const int from = one_part ? part * kAttentionPartKeys : 0;
  const int until = one_part ? std::min(from + kAttentionPartKeys, end) : end;
  auto& shared = shared_memory<MmaTiles<kWarps, kWidth>>();
  MmaTile<kWarps, kWidth> tile{n, span, shared, kv_head, first + warp_id() * 16, {}, {}, {}, {}};
  copy_rows<kRows>(q, last - first + 1, shared.q, [&](int r) { return n.q_offset(span, kv_head, first + r); });
  if (from < until) tile.load_block(k, v, from);
  ptx::cp_async_commit();
  tile.start_part();
  for (int begin = from; begin < until; begin += kAttentionKeys) {
    if (begin + kAttentionKeys < until) tile.load_block(k, v, begin + kAttentionKeys);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    sync_block();
    tile.key_block(begin);
    sync_block();  // the next block but one is copied to where this one lies
    const bool ends = (begin + kAttentionKeys) % kAttentionPartKeys == 0 || begin + kAttentionKeys >= until;
    if (!ends || one_part) continue;
    tile.merge_part();
    tile.start_part();
  }
  ptx::cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!tile.owns(i)) continue;
    if (one_part) {
      tile.store(to, i, tile.part[i], tile.out, part);
    } else {
      tile.store(to, i, tile.total[i], tile.total_out, 0);
    }
  }
}

template <int kWarps, int kWidth>
void launch_mma(const Attention& op, const AttentionSizes& n, const AttentionResult& to) {
  launch<attention_mma_kernel<kWarps, kWidth>>(
      {.blocks = {n.row_tiles(16 * kWarps), uint32_t(n.kv_heads), uint32_t(to.parts)},
       .threads = {32 * kWarps},
       .shared_bytes = sizeof(MmaTiles<kWarps, kWidth>)},
      op.q.data<bf16>(), op.k.data<bf16>(), op.v.data<bf16>(), to, n);
}

}  // namespace

bool launch_attention_mma(const Attention& op, const AttentionSizes& n, const AttentionResult& to, bool few_rows) {
  if (!takes_mma(op.head_dim, op.q, op.k, op.v, op.out)) return false;
  if (op.head_dim == 64) {
    few_rows ? launch_mma<1, 64>(op, n, to) : launch_mma<8, 64>(op, n, to);
  } else {
    few_rows ? launch_mma<1, 128>(op, n, to) : launch_mma<8, 128>(op, n, to);
  }
  return true;
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
