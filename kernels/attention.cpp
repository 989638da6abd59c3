#include "kernels/attention.h"

#include "kernels/attention_tiles.h"

namespace lightmoe {
namespace {

using namespace attention_detail;

// A block of query rows times the heads that share a key head; row r of the tile is query r / group, head r % group.
struct QueryTile {
  Span span;
  int64_t kv_head, first, queries;
};

template <class C> struct Workspace {
  int64_t width;  // head_dim, padded to whole vectors
  Tensor memory;
  C *q, *keys, *values, *scores, *out, *largest, *sum;
  explicit Workspace(const Sizes& z) : width(round_up(z.head_dim, kLanes<C>)) {
    const MemoryScope scope(MemoryCategory::kScratch);
    const int64_t rows = z.tile_rows();
    memory = Tensor::empty({2 * rows * width + 2 * kKeyBlock * width + rows * kKeyBlock + 2 * rows}, dtype_of<C>);
    q = memory.data<C>();
    out = q + rows * width;
    keys = out + rows * width;
    values = keys + kKeyBlock * width;
    scores = values + kKeyBlock * width;
    largest = scores + rows * kKeyBlock;
    sum = largest + rows;
  }
};

// Running softmax of one row over one block of keys (FlashAttention, arXiv 2205.14135): scores become unnormalised probabilities,
// what was summed before is rescaled to the new maximum. Keys that the row does not see, or that do not exist, get probability 0,
// which changes no bit of the sums: so a row's result does not depend on how many more keys its tile or its cache has.
template <class C> void softmax_row(C* scores, int64_t seen, int64_t padded, C* largest, C* sum, C* out, int64_t width) {
  if (seen <= 0) {
    std::fill(scores, scores + padded, C(0));
    return;
  }
  for (int64_t i = seen; i < padded; ++i) scores[i] = -std::numeric_limits<C>::infinity();
  C peak = *largest;
#pragma omp simd reduction(max : peak)
  for (int64_t i = 0; i < padded; ++i) peak = std::max(peak, scores[i]);
  const C correction = exp_of(*largest - peak);
#pragma omp simd
  for (int64_t i = 0; i < padded; ++i) scores[i] = exp_of(scores[i] - peak);
  Vec<C> total = {};
  for (int64_t i = 0; i < padded; i += kLanes<C>) total += load_vec(scores + i);
  *sum = *sum * correction + sum_lanes<C>(total);
  *largest = peak;
  for (int64_t d = 0; d < width; ++d) out[d] *= correction;
}

template <class T, class K>
void attend(const Attention& op, const Sizes& z, const QueryTile& tile, Workspace<compute_t<T>>* w) {
  using C = compute_t<T>;
  const int64_t rows = tile.queries * z.group, width = w->width, kv_row = z.kv_heads * z.head_dim;
  const int64_t q_row = tile.span.q_begin + tile.first, first_head = tile.kv_head * z.group;
  const C scale = static_cast<C>(1 / std::sqrt(static_cast<double>(z.head_dim)));
  for (int64_t j = 0; j < tile.queries; ++j) {
    const T* q = op.q.data<T>() + ((q_row + j) * z.heads + first_head) * z.head_dim;
    copy_tile(q, z.head_dim, z.group, z.head_dim, scale, w->q + j * z.group * width, width);
  }
  std::fill(w->out, w->out + rows * width, C(0));
  std::fill(w->sum, w->sum + rows, C(0));
  std::fill(w->largest, w->largest + rows, -std::numeric_limits<C>::infinity());
  const int64_t end = tile.span.visible(tile.first + tile.queries - 1);
  for (int64_t begin = 0; begin < end; begin += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, end - begin), padded = round_up(count, kLanes<C>);
    const int64_t at = (tile.span.k_begin + begin) * kv_row + tile.kv_head * z.head_dim;
    transpose_tile(op.k.data<K>() + at, kv_row, count, z.head_dim, w->keys);
    copy_tile(op.v.data<K>() + at, kv_row, count, z.head_dim, C(1), w->values, width);
    tile_product<C>(rows, padded, z.head_dim, {w->q, width, 1}, w->keys, kKeyBlock, {w->scores, kKeyBlock, false});
    for (int64_t r = 0; r < rows; ++r) {
      softmax_row(w->scores + r * kKeyBlock, std::min(count, tile.span.visible(tile.first + r / z.group) - begin), padded,
                  w->largest + r, w->sum + r, w->out + r * width, width);
    }
    tile_product<C>(rows, width, count, {w->scores, kKeyBlock, 1}, w->values, width, {w->out, width, true});
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = q_row + r / z.group, head = first_head + r % z.group;
    const C inverse = w->sum[r] > 0 ? C(1) / w->sum[r] : w->sum[r];  // no key: 0; NaN stays
    T* out = op.out.data<T>() + (row * z.heads + head) * z.head_dim;
    for (int64_t d = 0; d < z.head_dim; ++d) store(out, d, w->out[r * width + d] * inverse);
    if (op.lse.defined()) op.lse.data<C>()[head * z.queries + row] = w->largest[r] + std::log(w->sum[r]);
  }
}

template <class T, class K> void forward(const Attention& op) {
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
  share_items(static_cast<int64_t>(tiles.size()), cost, [&](const auto& next) {
    Workspace<compute_t<T>> workspace(z);
    for (int64_t i = next(); i >= 0; i = next()) attend<T, K>(op, z, tiles[static_cast<size_t>(i)], &workspace);
  });
}

void forward_cpu(const Attention& op) {
  visit_types("attention", op.q.dtype(), op.k.dtype(), [&]<class T, class K>() { forward<T, K>(op); });
}
const RegisterKernel<Attention> register_forward{DeviceKind::kCpu, &forward_cpu};

template <class Op> void check_inputs(const Op& op, const char* name) {
  require(op.head_dim > 0, "{}: head_dim is {}", name, op.head_dim);
  require(op.q.rank() == 2 && op.q.dim(1) % op.head_dim == 0, "{}: q is {}, expected [Tq, H*{}]", name,
          op.q.shape().str(), op.head_dim);
  require(op.k.rank() == 2 && op.k.dim(1) % op.head_dim == 0 && op.k.dim(1) > 0 && op.q.dim(1) % op.k.dim(1) == 0,
          "{}: k is {}, expected [Tk, Hkv*{}] with Hkv dividing H of q {}", name, op.k.shape().str(), op.head_dim,
          op.q.shape().str());
  require_tensor(op.v, name, "v", op.k.shape(), op.k.dtype());
  require_tensor(op.out, name, "out", op.q.shape(), op.q.dtype());
}

template <class Op> void check_sequences(const Op& op, const char* name) {
  const AttentionSequences& s = op.sequences;
  require(s.k_begin.rank() == 1, "{}: k_begin is {}, expected [N]", name, s.k_begin.shape().str());
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

}  // namespace

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
