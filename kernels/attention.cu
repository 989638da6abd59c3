#include "kernels/attention.h"

#include "kernels/attention_device.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kKeys = kAttentionKeys;
constexpr int kFewRows = 16, kManyRows = 64;  // of a tile
constexpr int64_t kFewBlocks = 512;           // below this a GPU is not full, and the parts become blocks of their own
constexpr int64_t kMaxPartBytes = int64_t{256} << 20;

template <int kRows, int kWidth>
struct AttentionTiles {
  float q[kRows][kWidth + 4], keys[kKeys][kWidth + 4], p[kRows][kKeys + 4];  // keys, then values
};

// One tile of rows against the keys, as one thread sees it.
template <int kRows, int kWidth>
struct RowTile {
  static constexpr int kR = kRows / 16, kC = kWidth / 16;
  const AttentionSizes& n;
  const AttentionSpan& span;
  AttentionTiles<kRows, kWidth>& shared;
  int kv_head, first, ty, tx;
  Running part[kR], total[kR];
  float out[kR][kC], total_out[kR][kC];

  DEVICE_FN int row(int i) const { return first + ty * kR + i; }
  DEVICE_FN bool owns(int i) const { return row(i) < span.queries * n.group; }
  DEVICE_FN int seen(int i) const { return owns(i) ? span.visible(row(i) / n.group) : 0; }

  DEVICE_FN void start_part() {
#pragma unroll
    for (int i = 0; i < kR; ++i) {
      part[i] = Running();
#pragma unroll
      for (int c = 0; c < kC; ++c) out[i][c] = 0;
    }
  }
  DEVICE_FN void merge_part() {
#pragma unroll
    for (int i = 0; i < kR; ++i) {
      const Merge merge(total[i], part[i]);
#pragma unroll
      for (int c = 0; c < kC; ++c) total_out[i][c] = merge(total_out[i][c], out[i][c]);
    }
  }

  // Scores become unnormalised probabilities in shared.p; what was summed before is scaled to the new maximum.
  DEVICE_FN void softmax_block(float (&score)[kR][4], int begin) {
#pragma unroll
    for (int i = 0; i < kR; ++i) {
      float largest = part[i].largest, sum = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (begin + tx + 16 * j >= seen(i)) score[i][j] = -INFINITY;
        largest = std::max(largest, score[i][j]);
      }
#pragma unroll
      for (int distance = 8; distance > 0; distance /= 2) largest = std::max(largest, shuffle_xor(largest, distance));
      const float shift = shift_of(largest), correction = fast_exp(part[i].largest - shift);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        score[i][j] = fast_exp(score[i][j] - shift);
        sum += score[i][j];
        shared.p[ty * kR + i][tx + 16 * j] = score[i][j];
      }
#pragma unroll
      for (int distance = 8; distance > 0; distance /= 2) sum += shuffle_xor(sum, distance);
      part[i].largest = largest;
      part[i].sum = std::fma(part[i].sum, correction, sum);
#pragma unroll
      for (int c = 0; c < kC; ++c) out[i][c] *= correction;
    }
  }

  DEVICE_FN void key_block(const Elements& k, const Elements& v, int begin) {
    const int count = std::min(int{kKeys}, span.k_count - begin);
    const auto at = [&](int r) { return n.k_offset(span, kv_head, begin + r); };
    sync_block();  // the block before may still read
    load_tile<kKeys, kWidth>(k, count, n.head_dim, 1.0f, shared.keys, at);
    sync_block();
    float score[kR][4];
    multiply_rows<kR, 4, kWidth + 4>(shared.q + ty * kR, shared.keys + tx, n.head_dim, score);
    softmax_block(score, begin);
    sync_block();
    load_tile<kKeys, kWidth>(v, count, n.head_dim, 1.0f, shared.keys, at);
    sync_block();
    add_rows<kR, kC, kWidth + 4>(count, shared.keys, tx * 4, out,
                                 [&](int i, int key) { return shared.p[ty * kR + i][key]; });
  }

  DEVICE_FN void store(const AttentionResult& to, int i, const Running& sums, const float (&values)[kC],
                       int part_index) {
    const bool whole = to.part_out == nullptr;
    const int64_t at = n.q_offset(span, kv_head, row(i)), slot = at / n.head_dim * to.parts + part_index;
    const Elements target = whole ? to.out : Elements{to.part_out, false, true};
    const float factor = whole ? (sums.sum == 0 ? 0.0f : 1 / sums.sum) : 1.0f;  // no key: 0
#pragma unroll
    for (int c = 0; c < kC; c += 4) {
      const Floats<4> four{values[c] * factor, values[c + 1] * factor, values[c + 2] * factor, values[c + 3] * factor};
      target.store(whole ? at : slot * n.head_dim, 16 * c + tx * 4, n.head_dim, four);
    }
    if (tx != 0) return;
    if (!whole) to.part_of[2 * slot] = sums.largest, to.part_of[2 * slot + 1] = sums.sum;
    if (whole && to.lse != nullptr) to.lse[n.lse_offset(span, kv_head, row(i))] = sums.largest + std::log(sums.sum);
  }
};

template <int kRows, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads, kRows == kFewRows ? 2 : 1)
    attention_kernel(Elements q, Elements k, Elements v, AttentionResult to, AttentionSizes n) {
  const SequenceTile at =
      find_tile(n.sequences, static_cast<int>(blockIdx.x), [&](int s) { return ceil_div(n.rows(s), int{kRows}); });
  if (at.sequence < 0) return;
  const AttentionSpan span = n.span(at.sequence);
  const int rows = n.rows(at.sequence), kv_head = static_cast<int>(blockIdx.y);
  // Last rows first: they see most keys, and long blocks should not be the last to start.
  const int first = (ceil_div(rows, int{kRows}) - 1 - at.tile) * kRows;
  const int last = std::min(first + kRows, rows) - 1, end = span.visible(last / n.group);
  auto& shared = shared_memory<AttentionTiles<kRows, kWidth>>();
  const int thread = static_cast<int>(threadIdx.x);
  RowTile<kRows, kWidth> tile{n, span, shared, kv_head, first, thread / 16, thread % 16, {}, {}, {}, {}};
  load_tile<kRows, kWidth>(q, last - first + 1, n.head_dim, n.scale, shared.q,
                           [&](int r) { return n.q_offset(span, kv_head, first + r); });
  const bool one_part = to.part_out != nullptr;
  const int part = static_cast<int>(blockIdx.z);
  const int from = one_part ? part * kAttentionPartKeys : 0,
            until = one_part ? std::min(from + kAttentionPartKeys, end) : end;
  tile.start_part();
  for (int begin = from; begin < until; begin += kKeys) {
    tile.key_block(k, v, begin);
    const bool ends = (begin + kKeys) % kAttentionPartKeys == 0 || begin + kKeys >= until;
    if (!ends || one_part) continue;
    tile.merge_part();
    tile.start_part();
  }
#pragma unroll
  for (int i = 0; i < tile.kR; ++i) {
    if (!tile.owns(i)) continue;
    if (one_part) {
      tile.store(to, i, tile.part[i], tile.out[i], part);
    } else {
      tile.store(to, i, tile.total[i], tile.total_out[i], 0);
    }
  }
}

// The parts of a row in their order, by one warp.
__global__ void __launch_bounds__(256)
    attention_merge_kernel(AttentionResult to, int queries, int heads, int head_dim) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + warp_id();
  if (row >= static_cast<int64_t>(queries) * heads) return;
  const float* of = to.part_of + 2 * row * to.parts;
  for (int d = lane_id() * 4; d < head_dim; d += 128) {
    Running total;
    Floats<4> out{};
    for (int part = 0; part < to.parts; ++part) {
      const Running own{of[2 * part], of[2 * part + 1]};
      if (own.largest == -INFINITY) continue;
      const Merge merge(total, own);
      const float* values = to.part_out + (row * to.parts + part) * head_dim;
#pragma unroll
      for (int c = 0; c < 4; ++c) out[c] = merge(out[c], d + c < head_dim ? values[d + c] : 0.0f);
    }
    const float factor = total.sum == 0 ? 0.0f : 1 / total.sum;
#pragma unroll
    for (int c = 0; c < 4; ++c) out[c] *= factor;
    to.out.store(row * head_dim, d, head_dim, out);
    if (to.lse == nullptr || d != 0) continue;
    to.lse[row % heads * queries + row / heads] = total.largest + std::log(total.sum);
  }
}

template <int kRows, int kWidth>
void launch_tiles(const Attention& op, const AttentionSizes& n, const AttentionResult& to) {
  launch<attention_kernel<kRows, kWidth>>({.blocks = {n.row_tiles(kRows), uint32_t(n.kv_heads), uint32_t(to.parts)},
                                           .threads = {kAttentionThreads},
                                           .shared_bytes = sizeof(AttentionTiles<kRows, kWidth>)},
                                          elements_of("attention", op.q, op.head_dim),
                                          elements_of("attention", op.k, op.head_dim),
                                          elements_of("attention", op.v, op.head_dim), to, n);
}

// Few rows and many keys: parts become blocks of their own. 0: not worth it.
int64_t parts_of(const Attention& op, const AttentionSizes& n) {
  const int64_t keys = op.sequences.max_k_count > 0 ? op.sequences.max_k_count : op.k.dim(0);
  const int64_t parts = ceil_div(keys, kAttentionPartKeys), rows = op.q.dim(0) * n.heads;
  const bool few = static_cast<int64_t>(n.row_tiles(kFewRows)) * n.kv_heads < kFewBlocks;
  return few && parts > 1 && rows * parts * (n.head_dim + 2) * 4 <= kMaxPartBytes ? parts : 0;
}

void forward_device(const Attention& op) {
  if (op.q.dim(0) == 0) return;
  const AttentionSizes n(op);
  if (attention_takes_wgmma() && launch_attention_wgmma(op, n)) return;
  const bool few_rows = op.q.dim(0) * n.group <= static_cast<int64_t>(kFewRows) * n.sequences;
  const int64_t parts = few_rows ? parts_of(op, n) : 0, rows = op.q.dim(0) * n.heads;
  AttentionResult to{elements_of("attention", op.out, op.head_dim), op.lse.defined() ? op.lse.data<float>() : nullptr,
                     nullptr, nullptr, 1};
  const MemoryScope scope(MemoryCategory::kScratch);
  Tensor part_out, part_of;
  if (parts > 0) {
    part_out = Tensor::empty({rows * parts, n.head_dim}, DType::kF32, kDevice);
    part_of = Tensor::empty({rows * parts, 2}, DType::kF32, kDevice);
    to.part_out = part_out.data<float>(), to.part_of = part_of.data<float>(), to.parts = static_cast<int>(parts);
  }
  const auto launch_f32 = [&]<int kWidth>() {
    if constexpr (kWidth <= 128) {
      if (!few_rows) return launch_tiles<kManyRows, kWidth>(op, n, to);
    }
    launch_tiles<kFewRows, kWidth>(op, n, to);
  };
  if (!launch_attention_mma(op, n, to, few_rows)) visit_head_width("attention", op.head_dim, launch_f32);
  if (parts == 0) return;
  launch<attention_merge_kernel>({.blocks = {static_cast<uint32_t>(ceil_div(rows, 8))}, .threads = {256}}, to,
                                 n.queries, n.heads, n.head_dim);
}
const RegisterKernel<Attention> register_forward{kDevice, &forward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
