#include "kernels/attention.h"

#include <cstdlib>
#include <string_view>

#include "kernels/attention_tiles.h"

namespace lightmoe {
namespace {

using namespace attention_detail;

constexpr int64_t kFewRows = 6;  // of a tile (decoding): scores are then computed with the keys in the lanes

// A block of query rows times the heads that share a key head; row r of the tile is query r / group, head r % group.
struct QueryTile {
  Span span;
  int64_t kv_head, first, queries;
};

// Scores lie across: scores[key][row], so that the softmax of a row runs down a lane and never across one.
template <class C>
struct Workspace {
  int64_t width, lanes;  // head_dim and the rows of a tile, padded to whole vectors
  Tensor memory;
  C *q_across, *keys, *values, *scores, *out, *largest, *sum, *correction, *shift;
  std::vector<int64_t> seen;
  explicit Workspace(const Sizes& z)
      : width(round_up(z.head_dim, kLanes<C>)), lanes(round_up(z.tile_rows(), kLanes<C>)) {
    const MemoryScope scope(MemoryCategory::kScratch);
    memory = Tensor::empty({lanes * (2 * width + kKeyBlock + 4) + 2 * kKeyBlock * width}, dtype_of<C>);
    C* next = memory.data<C>();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    q_across = take(width * lanes), out = take(lanes * width), scores = take(kKeyBlock * lanes);
    keys = take(kKeyBlock * width), values = take(kKeyBlock * width);
    largest = take(lanes), sum = take(lanes), correction = take(lanes), shift = take(lanes);
    seen.assign(static_cast<size_t>(lanes), 0);
  }
};

// Running softmax over one block of keys (FlashAttention, arXiv 2205.14135): scores become unnormalised probabilities, and
// correction[row] rescales what was summed before to the new maximum. A key that a row does not see gets probability 0, which
// changes no bit of its sums: so a result does not depend on how many more keys the tile or the cache has.
template <class C>
void softmax_block(Workspace<C>* w, int64_t keys, int64_t lanes, bool all_seen) {
  constexpr C kNever = -std::numeric_limits<C>::infinity();
  const int64_t* seen = w->seen.data();
  C *largest = w->largest, *sum = w->sum, *correction = w->correction, *shift = w->shift;
  std::copy(largest, largest + lanes, shift);
  for (int64_t i = 0; i < keys; ++i) {
    C* score = w->scores + i * w->lanes;
    if (!all_seen) {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) score[r] = i < seen[r] ? score[r] : kNever;
    }
#pragma omp simd
    for (int64_t r = 0; r < lanes; ++r) largest[r] = score[r] > largest[r] ? score[r] : largest[r];
  }
#pragma omp simd
  for (int64_t r = 0; r < lanes; ++r) {
    const C before = shift[r];
    shift[r] = largest[r] == kNever ? C(0) : largest[r];  // nothing seen yet: everything stays 0
    correction[r] = exp_of(before - shift[r]);
    sum[r] *= correction[r];
  }
  for (int64_t i = 0; i < keys; ++i) {
    C* score = w->scores + i * w->lanes;
#pragma omp simd
    for (int64_t r = 0; r < lanes; ++r) {
      score[r] = exp_of(score[r] - shift[r]);
      sum[r] += score[r];
    }
  }
}

template <class T, class K>
struct Rows {
  const T* q;
  const K *k, *v;
  T* out;
  compute_t<T>* lse;  // null: not kept
};

template <class T, class K>
class Tile {
 public:
  using C = compute_t<T>;
  Tile(const Rows<T, K>& rows, const Sizes& z, const QueryTile& tile, Workspace<C>* workspace)
      : at_(rows),
        z_(z),
        tile_(tile),
        w_(*workspace),
        rows_(tile.queries * z.group),
        lanes_(round_up(rows_, kLanes<C>)),
        head_(tile.kv_head * z.group) {}

  void run() {
    load_queries();
    const int64_t end = tile_.span.visible(tile_.first + tile_.queries - 1);
    for (int64_t begin = 0; begin < end; begin += kKeyBlock) {
      if (rows_ <= kFewRows) prefetch_block(begin + kKeyBlock, std::min(end, begin + 2 * kKeyBlock));
      key_block(begin, std::min(kKeyBlock, end - begin));
    }
    store();
  }

 private:
  int64_t q_offset(int64_t j) const {
    return ((tile_.span.q_begin + tile_.first + j) * z_.heads + head_) * z_.head_dim;
  }

  void load_queries() {
    const C scale = static_cast<C>(1 / std::sqrt(static_cast<double>(z_.head_dim)));
    C* q = w_.out;  // free until the first block
    for (int64_t j = 0; j < tile_.queries; ++j) {
      const T* from = at_.q + q_offset(j);
      copy_tile(from, z_.head_dim, z_.group, z_.head_dim, scale, q + j * z_.group * w_.width, w_.width);
    }
    transpose_tile(q, w_.width, rows_, z_.head_dim, w_.q_across, w_.lanes);
    std::fill(w_.out, w_.out + rows_ * w_.width, C(0));
    std::fill(w_.sum, w_.sum + lanes_, C(0));
    std::fill(w_.largest, w_.largest + lanes_, -std::numeric_limits<C>::infinity());
    if (rows_ <= kFewRows) std::fill(w_.scores, w_.scores + kKeyBlock * lanes_, C(0));  // lanes that no row fills
  }

  // One head's part of a key is too short for the hardware to see where the next one lies.
  void prefetch_block(int64_t begin, int64_t end) const {
    constexpr int64_t kLine = 64 / sizeof(K);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = ((tile_.span.k_begin + i) * z_.kv_heads + tile_.kv_head) * z_.head_dim;
      for (int64_t d = 0; d < z_.head_dim; d += kLine) {
        __builtin_prefetch(at_.k + at + d, 0, 2);
        __builtin_prefetch(at_.v + at + d, 0, 2);
      }
    }
  }

  void key_block(int64_t begin, int64_t count) {
    const int64_t kv_row = z_.kv_heads * z_.head_dim;
    const int64_t at = (tile_.span.k_begin + begin) * kv_row + tile_.kv_head * z_.head_dim;
    const K* v = at_.v + at;
    rows_ <= kFewRows ? scores_by_key(at_.k + at, kv_row, count) : scores_by_row(at_.k + at, kv_row, count);
    const C* values = w_.values;
    int64_t values_row = w_.width;
    if constexpr (std::is_same_v<K, C>) {  // what is read only once is not worth a copy
      if (rows_ <= kFewRows && w_.width == z_.head_dim) values = v, values_row = kv_row;
    }
    if (values == w_.values) copy_tile(v, kv_row, count, z_.head_dim, C(1), w_.values, w_.width);

    bool all_seen = true;
    for (int64_t r = 0; r < rows_; ++r) {
      w_.seen[static_cast<size_t>(r)] = tile_.span.visible(tile_.first + r / z_.group) - begin;
      all_seen = all_seen && w_.seen[static_cast<size_t>(r)] >= count;
    }
    softmax_block(&w_, count, lanes_, all_seen);
    for (int64_t r = 0; r < rows_; ++r) {
      if (w_.correction[r] == C(1)) continue;
      for (int64_t d = 0; d < w_.width; ++d) w_.out[r * w_.width + d] *= w_.correction[r];
    }
    tile_product<C>(rows_, w_.width, count, {w_.scores, 1, w_.lanes}, values, values_row, {w_.out, w_.width, true});
  }

  void scores_by_row(const K* k, int64_t kv_row, int64_t count) {
    TileFactor<C> keys{w_.keys, w_.width, 1};
    if constexpr (std::is_same_v<K, C>)
      keys = {k, kv_row, 1};
    else
      copy_tile(k, kv_row, count, z_.head_dim, C(1), w_.keys, w_.width);
    tile_product<C>(count, lanes_, z_.head_dim, keys, w_.q_across, w_.lanes, {w_.scores, w_.lanes, false});
  }

  // The same sums, term for term, a vector of keys at a time instead of a vector of mostly empty rows.
  void scores_by_key(const K* k, int64_t kv_row, int64_t count) {
    transpose_tile(k, kv_row, count, z_.head_dim, w_.keys, kKeyBlock);
    C across[kFewRows * kKeyBlock];
    tile_product<C>(rows_, round_up(count, kLanes<C>), z_.head_dim, {w_.q_across, 1, w_.lanes}, w_.keys, kKeyBlock,
                    {across, kKeyBlock, false});
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t r = 0; r < rows_; ++r) w_.scores[i * w_.lanes + r] = across[r * kKeyBlock + i];
    }
  }

  void store() {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t j = r / z_.group, g = r % z_.group;
      const C inverse = w_.sum[r] == 0 ? C(0) : C(1) / w_.sum[r];  // no key: 0
      T* out = at_.out + q_offset(j) + g * z_.head_dim;
      for (int64_t d = 0; d < z_.head_dim; ++d) lightmoe::store(out, d, w_.out[r * w_.width + d] * inverse);
      if (at_.lse == nullptr) continue;
      C* lse = at_.lse + (head_ + g) * z_.queries + tile_.span.q_begin + tile_.first;
      lse[j] = w_.largest[r] + std::log(w_.sum[r]);
    }
  }

  const Rows<T, K>& at_;
  const Sizes& z_;
  const QueryTile& tile_;
  Workspace<C>& w_;
  const int64_t rows_, lanes_, head_;
};

template <class T, class K>
void forward(const Attention& op) {
  const Sizes z(op);
  std::vector<QueryTile> tiles;
  int64_t cost = 0;
  for (int64_t n = 0; n < z.sequences; ++n) {
    const Span span = span_of(op.sequences, n);
    // Last queries first: they see most keys, and the long items should not be the last to start.
    for (int64_t end = span.queries; end > 0; end -= z.query_block()) {
      const int64_t first = std::max<int64_t>(0, end - z.query_block());
      for (int64_t head = 0; head < z.kv_heads; ++head) tiles.push_back({span, head, first, end - first});
      cost += (end - first) * (span.visible(end - 1) + 1) * z.heads * z.head_dim;
    }
  }
  const Rows<T, K> rows{op.q.data<T>(), op.k.data<K>(), op.v.data<K>(), op.out.data<T>(),
                        op.lse.defined() ? op.lse.data<compute_t<T>>() : nullptr};
  share_items(static_cast<int64_t>(tiles.size()), cost, [&](const auto& next) {
    Workspace<compute_t<T>> workspace(z);
    for (int64_t i = next(); i >= 0; i = next()) Tile<T, K>(rows, z, tiles[static_cast<size_t>(i)], &workspace).run();
  });
}

void forward_cpu(const Attention& op) {
  visit_types("attention", op.q.dtype(), op.k.dtype(), [&]<class T, class K>() { forward<T, K>(op); });
}
const RegisterKernel<Attention> register_forward{DeviceKind::kCpu, &forward_cpu};

template <class Op>
void check_inputs(const Op& op, const char* name) {
  require(op.head_dim > 0, "{}: head_dim is {}", name, op.head_dim);
  require(op.q.rank() == 2 && op.q.dim(1) % op.head_dim == 0, "{}: q is {}, expected [Tq, H*{}]", name, op.q.shape(),
          op.head_dim);
  require(op.k.rank() == 2 && op.k.dim(1) % op.head_dim == 0 && op.k.dim(1) > 0 && op.q.dim(1) % op.k.dim(1) == 0,
          "{}: k is {}, expected [Tk, Hkv*{}] with Hkv dividing H of q {}", name, op.k.shape(), op.head_dim,
          op.q.shape());
  require_tensor(op.v, name, "v", op.k.shape(), op.k.dtype());
  require_tensor(op.out, name, "out", op.q.shape(), op.q.dtype());
}

template <class Op>
void check_sequences(const Op& op, const char* name) {
  const AttentionSequences& s = op.sequences;
  require(s.k_begin.rank() == 1, "{}: k_begin is {}, expected [N]", name, s.k_begin.shape());
  const Shape shape{s.k_begin.dim(0)};
  require_tensor(s.q_begin, name, "q_begin", {s.k_begin.dim(0) + 1}, DType::kI32);
  require_tensor(s.k_begin, name, "k_begin", shape, DType::kI32);
  require_tensor(s.k_count, name, "k_count", shape, DType::kI32);
  require_tensor(s.q_pos, name, "q_pos", shape, DType::kI32);
  if (op.q.device() != DeviceKind::kCpu) return;
  require(s.q_begin.template data<int32_t>()[0] == 0 && s.q_begin.template data<int32_t>()[shape[0]] == op.q.dim(0),
          "{}: q_begin spans [{}, {}], expected [0, {}]", name, s.q_begin.template data<int32_t>()[0],
          s.q_begin.template data<int32_t>()[shape[0]], op.q.dim(0));
  for (int64_t n = 0; n < shape[0]; ++n) {
    const Span span = span_of(s, n);
    require(span.queries >= 0 && span.k_begin >= 0 && span.k_count >= 0 && span.k_begin + span.k_count <= op.k.dim(0),
            "{}: sequence {} has {} queries and keys {} + {} of {}", name, n, span.queries, span.k_begin, span.k_count,
            op.k.dim(0));
  }
}

bool& takes_wgmma() {
  static bool on = [] {
    const char* set = std::getenv("LIGHTMOE_ATTENTION");
    const std::string_view name = set != nullptr ? set : "auto";
    check(name == "auto" || name == "mma", ErrorKind::kUsage, "LIGHTMOE_ATTENTION={}: expected auto or mma", name);
    return name == "auto";
  }();
  return on;
}

}  // namespace

bool attention_takes_wgmma() { return takes_wgmma(); }
void set_attention_takes_wgmma(bool on) { takes_wgmma() = on; }

void run(const Attention& op) {
  check_inputs(op, "attention");
  check_sequences(op, "attention");
  if (op.lse.defined()) {
    require_tensor(op.lse, "attention", "lse", {op.q.dim(1) / op.head_dim, op.q.dim(0)}, accumulator_of(op.q.dtype()));
  }
  dispatch(op, op.q.device(), "attention");
}

void run(const AttentionBackward& op) {
  check_inputs(op, "attention_backward");
  check_sequences(op, "attention_backward");
  const Shape lse{op.q.dim(1) / op.head_dim, op.q.dim(0)};
  require_tensor(op.lse, "attention_backward", "lse", lse, accumulator_of(op.q.dtype()));
  require_tensor(op.dout, "attention_backward", "dout", op.q.shape(), op.q.dtype());
  require_tensor(op.dq, "attention_backward", "dq", op.q.shape(), op.q.dtype());
  require_tensor(op.dk, "attention_backward", "dk", op.k.shape(), op.k.dtype());
  require_tensor(op.dv, "attention_backward", "dv", op.k.shape(), op.k.dtype());
  dispatch(op, op.q.device(), "attention_backward");
}

}  // namespace lightmoe
