#pragma once
// What attention.cu and attention_backward.cu share. Rows of a sequence are its (query, head of the group) pairs, row r being query
// r / group and head r % group of the key head's group: heads that share keys stand together in a tile. Which sequence a block works
// on is found on the device, so that the host launches an upper bound of blocks and reads no offsets.
// Blocks have 16 x 16 threads: thread (ty, tx) owns some consecutive rows and every sixteenth key, or four columns of every 64.

#include "kernels/attention.h"
#include "kernels/device/reduce.h"
#include "kernels/device/vector.h"

namespace lightmoe::LIGHTMOE_DEVICE {

constexpr int kAttentionThreads = 256;

DEVICE_FN void store_pair(bf16* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack_bf16(first, second);
}

// f32 or bf16, told at run time: only loads and stores differ, and they are few.
struct Elements {
  const void* data;
  bool is_bf16, aligned;
  DEVICE_FN Floats<8> load(int64_t row, int i, int n) const {
    if (is_bf16) return load_floats<8>(static_cast<const bf16*>(data) + row, i, n, aligned);
    return load_floats<8>(static_cast<const float*>(data) + row, i, n, aligned);
  }
  // The elements behind were written by nobody else.
  DEVICE_FN void store(int64_t row, int i, int n, const Floats<4>& values) const {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (i + c >= n) continue;
      if (is_bf16) {
        static_cast<bf16*>(const_cast<void*>(data))[row + i + c] = from_float<bf16>(values[c]);
      } else {
        static_cast<float*>(const_cast<void*>(data))[row + i + c] = values[c];
      }
    }
  }
};

inline Elements elements_of(const char* op, const Tensor& t, int64_t head_dim) {
  if (t.dtype() != DType::kF32 && t.dtype() != DType::kBF16) unsupported_dtype(op, t.dtype());
  const bool aligned = head_dim % 8 == 0 && reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0;
  return {t.raw(), t.dtype() == DType::kBF16, aligned};
}

struct AttentionSpan {
  int q_begin, queries, k_begin, k_count, q_pos;
  DEVICE_FN int visible(int query) const { return std::max(0, std::min(k_count, q_pos + query + 1)); }
};

struct AttentionSizes {
  const int32_t *q_begin, *k_begin, *k_count, *q_pos;
  int sequences, queries, heads, kv_heads, head_dim, group;
  float scale;
  template <class Op>
  explicit AttentionSizes(const Op& op)
      : q_begin(op.sequences.q_begin.template data<int32_t>()),
        k_begin(op.sequences.k_begin.template data<int32_t>()),
        k_count(op.sequences.k_count.template data<int32_t>()),
        q_pos(op.sequences.q_pos.template data<int32_t>()),
        sequences(static_cast<int>(op.sequences.k_begin.dim(0))),
        queries(static_cast<int>(op.q.dim(0))),
        heads(static_cast<int>(op.q.dim(1) / op.head_dim)),
        kv_heads(static_cast<int>(op.k.dim(1) / op.head_dim)),
        head_dim(static_cast<int>(op.head_dim)),
        group(heads / kv_heads),
        scale(static_cast<float>(1 / std::sqrt(static_cast<double>(op.head_dim)))) {}
  // At most so many tiles of `size` rows, or keys, as ceil of each sequence's count adds up to.
  uint32_t row_tiles(int size) const {
    return static_cast<uint32_t>(static_cast<int64_t>(queries) * group / size + sequences);
  }
  DEVICE_FN AttentionSpan span(int n) const {
    return {q_begin[n], q_begin[n + 1] - q_begin[n], k_begin[n], k_count[n], q_pos[n]};
  }
  DEVICE_FN int rows(int n) const { return (q_begin[n + 1] - q_begin[n]) * group; }
  DEVICE_FN int head(int kv_head, int row) const { return kv_head * group + row % group; }
  DEVICE_FN int64_t q_offset(const AttentionSpan& s, int kv_head, int row) const {
    return (static_cast<int64_t>(s.q_begin + row / group) * heads + head(kv_head, row)) * head_dim;
  }
  DEVICE_FN int64_t k_offset(const AttentionSpan& s, int kv_head, int key) const {
    return (static_cast<int64_t>(s.k_begin + key) * kv_heads + kv_head) * head_dim;
  }
  DEVICE_FN int64_t lse_offset(const AttentionSpan& s, int kv_head, int row) const {
    return static_cast<int64_t>(head(kv_head, row)) * queries + s.q_begin + row / group;
  }
};

// How a row goes through its keys, in attention.cu and attention_mma.cu alike: in blocks, with a running maximum (arXiv 2205.14135), and
// through its blocks in parts: each part starts afresh and is merged into the total at its end. Blocks and parts are counted from key 0
// of the sequence, a key that a row does not see adds exact zeros, and the sums of a row never meet another row. So the bits of a result
// are the same whether one block works through all parts (prefill) or many take one each and a second kernel merges them (decode), and
// whatever else is in the call.
constexpr int kAttentionKeys = 64;
constexpr int kAttentionPartKeys = 4 * kAttentionKeys;

struct Running {
  float largest = -INFINITY, sum = 0;
};
DEVICE_FN float shift_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// Appends a part with its own maximum: total becomes total x before + part x after.
struct Merge {
  float before, after;
  DEVICE_FN Merge(Running& total, const Running& part) {
    const float largest = std::max(total.largest, part.largest);
    before = fast_exp(total.largest - shift_of(largest)), after = fast_exp(part.largest - shift_of(largest));
    total.sum = std::fma(total.sum, before, part.sum * after);
    total.largest = largest;
  }
  DEVICE_FN float operator()(float total, float part) const { return std::fma(total, before, part * after); }
};

struct AttentionResult {
  Elements out;
  float* lse;       // null: not kept
  float* part_out;  // [rows of q x heads, parts, head_dim]; null: parts are merged in the kernel
  float* part_of;   // [rows of q x heads, parts, 2]: maximum and sum
  int parts;
};
// bf16 on the tensor cores (attention_mma.cu); false, and nothing launched, where these do not take the shapes.
bool launch_attention_mma(const Attention& op, const AttentionSizes& n, const AttentionResult& to, bool few_rows);
// The same of backward (attention_mma_backward.cu). delta f32 [H, Tq] = <out, dout>.
bool launch_attention_backward_mma(const AttentionBackward& op, const AttentionSizes& n, const Tensor& delta);

// Hopper's forms of training's passes (attention_wgmma.h); false likewise.
bool launch_attention_wgmma(const Attention& op, const AttentionSizes& n);
bool launch_attention_backward_wgmma(const AttentionBackward& op, const AttentionSizes& n, const Tensor& delta);

struct SequenceTile {
  int sequence, tile;  // sequence -1: this block is behind the last tile
};
// The tile-th of all tiles, where sequence n has tiles_of(n); called by whole warps.
template <class F>
DEVICE_FN SequenceTile find_tile(int sequences, int tile, F&& tiles_of) {
  for (int first = 0; first < sequences; first += 32) {
    const int own = first + lane_id() < sequences ? tiles_of(first + lane_id()) : 0;
    int sum = own;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = shuffle_up(sum, distance);
      if (lane_id() >= distance) sum += other;
    }
    const unsigned behind = ballot(tile < sum);
    if (behind != 0) {
      const int lane = std::countr_zero(behind);
      return {first + lane, tile - shuffle(sum - own, lane)};
    }
    tile -= shuffle(sum, 31);
  }
  return {-1, 0};
}

// to[r][:] = factor x row(r), r < count; zeros in the rows behind and in the columns from n on.
template <int kRows, int kWidth, class F>
DEVICE_FN void load_tile(const Elements& from, int count, int n, float factor, float (&to)[kRows][kWidth + 4],
                         F&& row) {
  for (int i = static_cast<int>(threadIdx.x); i < kRows * (kWidth / 8); i += kAttentionThreads) {
    const int r = i / (kWidth / 8), column = i % (kWidth / 8) * 8;
    Floats<8> values{};
    if (r < count) values = from.load(row(r), column, n);
    Floats<4> low, high;
#pragma unroll
    for (int c = 0; c < 4; ++c) low[c] = values[c] * factor, high[c] = values[c + 4] * factor;
    store_floats<4>(to[r], column, kWidth + 4, true, low);
    store_floats<4>(to[r], column + 4, kWidth + 4, true, high);
  }
}

// c[i][j] = <a row i, b row 16 j> over the first `width` columns, in their order.
template <int kR, int kC, int kStride>
DEVICE_FN void multiply_rows(const float (*a)[kStride], const float (*b)[kStride], int width, float (&c)[kR][kC]) {
#pragma unroll
  for (int i = 0; i < kR * kC; ++i) c[i / kC][i % kC] = 0;
#pragma unroll 2
  for (int d = 0; d < width; d += 4) {
    Floats<4> left[kR], right[kC];
#pragma unroll
    for (int i = 0; i < kR; ++i) left[i] = load_floats<4>(a[i], d, kStride, true);
#pragma unroll
    for (int j = 0; j < kC; ++j) right[j] = load_floats<4>(b[16 * j], d, kStride, true);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int i = 0; i < kR * kC; ++i)
        c[i / kC][i % kC] = std::fma(left[i / kC][e], right[i % kC][e], c[i / kC][i % kC]);
    }
  }
}

// c[i][4 j + e] += sum over k < depth of factors(i, k) b[k][64 j + column + e].
template <int kR, int kC, int kStride, class F>
DEVICE_FN void add_rows(int depth, const float (*b)[kStride], int column, float (&c)[kR][kC], F&& factors_of) {
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    Floats<4> right[kC / 4];
    float left[kR];
#pragma unroll
    for (int i = 0; i < kR; ++i) left[i] = factors_of(i, k);
#pragma unroll
    for (int j = 0; j < kC / 4; ++j) right[j] = load_floats<4>(b[k], 64 * j + column, kStride, true);
#pragma unroll
    for (int i = 0; i < kR * kC; ++i) {
      c[i / kC][i % kC] = std::fma(left[i / kC], right[i % kC / 4][i % 4], c[i / kC][i % kC]);
    }
  }
}

// Calls f.template operator()<kWidth>(): head_dim, padded.
template <class F>
void visit_head_width(const char* op, int64_t head_dim, F&& f) {
  check(head_dim <= 256, ErrorKind::kDevice, "{}: head_dim is {}, on {} at most 256", op, head_dim, name_of(kDevice));
  if (head_dim <= 64) return f.template operator()<64>();
  if (head_dim <= 128) return f.template operator()<128>();
  f.template operator()<256>();
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
