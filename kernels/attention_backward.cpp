#include <vector>

#include "kernels/attention.h"
#include "kernels/attention_tiles.h"

namespace lightmoe {
namespace {

using namespace attention_detail;

template <class C>
struct Workspace {
  int64_t width;  // head_dim, padded to whole vectors
  Tensor memory;
  C *keys, *keys_across, *values_across, *dk, *dv;  // of a block of keys
  C *q, *dout, *probs, *dscores;                    // of a tile of queries
  C *dq, *delta;                                    // of all queries of a sequence
  Workspace(const Sizes& z, int64_t most_queries) : width(round_up(z.head_dim, kLanes<C>)) {
    const MemoryScope scope(MemoryCategory::kScratch);
    const int64_t rows = z.tile_rows(), key_tile = kKeyBlock * width, all_rows = most_queries * z.group;
    memory = Tensor::empty({5 * key_tile + 2 * rows * (width + kKeyBlock) + all_rows * (width + 1)}, dtype_of<C>);
    C* next = memory.data<C>();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    keys = take(key_tile), keys_across = take(key_tile), values_across = take(key_tile), dk = take(key_tile),
    dv = take(key_tile);
    q = take(rows * width), dout = take(rows * width), probs = take(rows * kKeyBlock), dscores = take(rows * kKeyBlock);
    dq = take(all_rows * width), delta = take(all_rows);
  }
};

template <class T, class K>
struct Rows {
  const T *q, *out, *dout;
  const K *k, *v;
  const compute_t<T>* lse;
  T* dq;
  K *dk, *dv;
  explicit Rows(const AttentionBackward& op)
      : q(op.q.data<T>()),
        out(op.out.data<T>()),
        dout(op.dout.data<T>()),
        k(op.k.data<K>()),
        v(op.v.data<K>()),
        lse(op.lse.data<compute_t<T>>()),
        dq(op.dq.data<T>()),
        dk(op.dk.data<K>()),
        dv(op.dv.data<K>()) {}
};

// One sequence and one key head with the query heads that share it. Row r of the sequence is query r / group, head r % group.
template <class T, class K>
class Item {
 public:
  using C = compute_t<T>;
  Item(const Rows<T, K>& rows, const Sizes& z, const Span& span, int64_t kv_head, Workspace<C>* workspace)
      : at_(rows),
        z_(z),
        w_(*workspace),
        span_(span),
        kv_head_(kv_head),
        scale_(static_cast<C>(1 / std::sqrt(static_cast<double>(z.head_dim)))) {}

  void run() {
    prepare_queries();
    for (int64_t begin = 0; begin < span_.k_count; begin += kKeyBlock) {
      keys_begin_ = begin, keys_ = std::min(kKeyBlock, span_.k_count - begin), padded_ = round_up(keys_, kLanes<C>);
      load_keys();
      // Queries before first see none of these keys.
      const int64_t first = std::max<int64_t>(0, begin - span_.q_pos);
      for (int64_t j = first; j < span_.queries; j += z_.query_block()) {
        query_tile(j, std::min(z_.query_block(), span_.queries - j));
      }
      store_keys();
    }
    store_queries();
  }

 private:
  int64_t q_offset(int64_t j) const { return ((span_.q_begin + j) * z_.heads + kv_head_ * z_.group) * z_.head_dim; }
  int64_t k_offset(int64_t i) const { return ((span_.k_begin + i) * z_.kv_heads + kv_head_) * z_.head_dim; }

  // delta = <out, dout>, dq = 0.
  void prepare_queries() {
    const int64_t rows = span_.queries * z_.group;
    std::fill(w_.dq, w_.dq + rows * w_.width, C(0));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = q_offset(r / z_.group) + r % z_.group * z_.head_dim;
      const T *out = at_.out + at, *dout = at_.dout + at;
      Vec<C> sum = {};
      int64_t d = 0;
      for (; d + kLanes<C> <= z_.head_dim; d += kLanes<C>) sum += load_vec(out + d) * load_vec(dout + d);
      if (d < z_.head_dim) sum += load_part(out + d, z_.head_dim - d) * load_part(dout + d, z_.head_dim - d);
      w_.delta[r] = sum_lanes<C>(sum);
    }
  }

  void load_keys() {
    const int64_t row = z_.kv_heads * z_.head_dim;
    const K *k = at_.k + k_offset(keys_begin_), *v = at_.v + k_offset(keys_begin_);
    copy_tile(k, row, keys_, z_.head_dim, C(1), w_.keys, w_.width);
    transpose_tile(k, row, keys_, z_.head_dim, w_.keys_across, kKeyBlock);
    transpose_tile(v, row, keys_, z_.head_dim, w_.values_across, kKeyBlock);
    std::fill(w_.dk, w_.dk + keys_ * w_.width, C(0));
    std::fill(w_.dv, w_.dv + keys_ * w_.width, C(0));
  }

  // p and ds of queries [j, j + count) against this block of keys, and what they add to dq, dk, dv.
  void query_tile(int64_t j, int64_t count) {
    const int64_t rows = count * z_.group, width = w_.width;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t to = i * z_.group * width;
      copy_tile(at_.q + q_offset(j + i), z_.head_dim, z_.group, z_.head_dim, scale_, w_.q + to, width);
      copy_tile(at_.dout + q_offset(j + i), z_.head_dim, z_.group, z_.head_dim, C(1), w_.dout + to, width);
    }
    tile_product<C>(rows, padded_, z_.head_dim, {w_.q, width, 1}, w_.keys_across, kKeyBlock,
                    {w_.probs, kKeyBlock, false});
    tile_product<C>(rows, padded_, z_.head_dim, {w_.dout, width, 1}, w_.values_across, kKeyBlock,
                    {w_.dscores, kKeyBlock, false});
    for (int64_t r = 0; r < rows; ++r) score_row(j, r);
    tile_product<C>(keys_, width, rows, {w_.probs, 1, kKeyBlock}, w_.dout, width, {w_.dv, width, true});
    tile_product<C>(keys_, width, rows, {w_.dscores, 1, kKeyBlock}, w_.q, width, {w_.dk, width, true});
    C* dq = w_.dq + j * z_.group * width;
    tile_product<C>(rows, width, keys_, {w_.dscores, kKeyBlock, 1}, w_.keys, width, {dq, width, true});
  }

  // Row r of the tile that begins at query j: scores -> p, dp -> ds; both 0 where the key is not seen.
  void score_row(int64_t j, int64_t r) {
    const int64_t query = j + r / z_.group, head = kv_head_ * z_.group + r % z_.group;
    const int64_t seen = std::clamp<int64_t>(span_.visible(query) - keys_begin_, 0, keys_);
    const C lse = at_.lse[head * z_.queries + span_.q_begin + query];
    const C delta = w_.delta[query * z_.group + r % z_.group];
    C *p = w_.probs + r * kKeyBlock, *ds = w_.dscores + r * kKeyBlock;
#pragma omp simd
    for (int64_t i = 0; i < padded_; ++i) {
      const C prob = i < seen ? exp_of(p[i] - lse) : C(0);
      p[i] = prob;
      ds[i] = i < seen ? prob * (ds[i] - delta) : C(0);
    }
  }

  void store_keys() {
    for (int64_t i = 0; i < keys_; ++i) {
      K *dk = at_.dk + k_offset(keys_begin_ + i), *dv = at_.dv + k_offset(keys_begin_ + i);
      for (int64_t d = 0; d < z_.head_dim; ++d) {  // dk: the tile of q carries the scale already
        store(dk, d, static_cast<compute_t<K>>(w_.dk[i * w_.width + d]));
        store(dv, d, static_cast<compute_t<K>>(w_.dv[i * w_.width + d]));
      }
    }
  }

  void store_queries() {
    for (int64_t r = 0; r < span_.queries * z_.group; ++r) {
      T* dq = at_.dq + q_offset(r / z_.group) + r % z_.group * z_.head_dim;
      for (int64_t d = 0; d < z_.head_dim; ++d) store(dq, d, scale_ * w_.dq[r * w_.width + d]);
    }
  }

  const Rows<T, K>& at_;
  const Sizes& z_;
  Workspace<C>& w_;
  const Span span_;
  const int64_t kv_head_;
  const C scale_;
  int64_t keys_begin_ = 0, keys_ = 0, padded_ = 0;
};

void clear_rows_without_owner(const AttentionBackward& op, const std::vector<Span>& spans) {
  std::vector<bool> owned(static_cast<size_t>(op.dk.dim(0)), false);
  for (const Span& span : spans) {
    std::fill_n(owned.begin() + span.k_begin, span.k_count, true);
  }
  for (int64_t row = 0; row < op.dk.dim(0); ++row) {
    if (owned[static_cast<size_t>(row)]) continue;
    op.dk.slice(row, row + 1).fill_zero();
    op.dv.slice(row, row + 1).fill_zero();
  }
}

template <class T, class K>
void backward(const AttentionBackward& op) {
  const Sizes z(op);
  std::vector<Span> spans;
  int64_t cost = 0, most_queries = 0;
  for (int64_t n = 0; n < z.sequences; ++n) {
    spans.push_back(span_of(op.sequences, n));
    most_queries = std::max(most_queries, spans.back().queries);
    cost += 2 * spans.back().queries * (spans.back().k_count + 1) * z.heads * z.head_dim;
  }
  clear_rows_without_owner(op, spans);
  const Rows<T, K> rows(op);
  share_items(z.sequences * z.kv_heads, cost, [&](const auto& next) {
    Workspace<compute_t<T>> workspace(z, most_queries);
    for (int64_t i = next(); i >= 0; i = next()) {
      Item<T, K>(rows, z, spans[static_cast<size_t>(i / z.kv_heads)], i % z.kv_heads, &workspace).run();
    }
  });
}

void backward_cpu(const AttentionBackward& op) {
  visit_types("attention_backward", op.q.dtype(), op.k.dtype(), [&]<class T, class K>() { backward<T, K>(op); });
}
const RegisterKernel<AttentionBackward> register_backward{DeviceKind::kCpu, &backward_cpu};

}  // namespace
}  // namespace lightmoe
