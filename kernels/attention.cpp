#include "kernels/attention.h"

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/access.h"
#include "kernels/cpu_math.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

template <class Op> struct Sizes {
  int64_t queries, keys, sequences, heads, kv_heads, head_dim, group;
  explicit Sizes(const Op& op)
      : queries(op.q.dim(0)),
        keys(op.k.dim(0)),
        sequences(op.sequences.k_begin.dim(0)),
        heads(op.q.dim(1) / op.head_dim),
        kv_heads(op.k.dim(1) / op.head_dim),
        head_dim(op.head_dim),
        group(heads / kv_heads) {}
};

struct Span {
  int64_t q_begin, q_end, k_begin, k_count, q_pos;
  int64_t visible(int64_t row) const { return std::min(k_count, q_pos + (row - q_begin) + 1); }
};
Span span_of(const AttentionSequences& s, int64_t n) {
  return {s.q_begin.data<int32_t>()[n], s.q_begin.data<int32_t>()[n + 1], s.k_begin.data<int32_t>()[n],
          s.k_count.data<int32_t>()[n], s.q_pos.data<int32_t>()[n]};
}

template <class C, class A, class B> C dot(const A* a, const B* b, int64_t n) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<C>(load(a, i)) * static_cast<C>(load(b, i));
  return sum;
}

template <class T, class K> void forward(const Attention& op) {
  using C = compute_t<T>;
  const Sizes<Attention> z(op);
  const T* q = op.q.data<T>();
  const K *k = op.k.data<K>(), *v = op.v.data<K>();
  T* out = op.out.data<T>();
  C* lse = op.lse.defined() ? op.lse.data<C>() : nullptr;
  const C scale = static_cast<C>(1 / std::sqrt(static_cast<double>(z.head_dim)));
  parallel_items(z.sequences * z.heads, [&](int64_t item) {
    const int64_t head = item % z.heads, kv = head / z.group * z.head_dim;
    const Span span = span_of(op.sequences, item / z.heads);
    std::vector<C> p(static_cast<size_t>(std::max<int64_t>(span.k_count, 0))), sum(static_cast<size_t>(z.head_dim));
    for (int64_t row = span.q_begin; row < span.q_end; ++row) {
      const int64_t visible = std::max<int64_t>(span.visible(row), 0);
      C largest = -std::numeric_limits<C>::infinity(), total = 0;
      for (int64_t j = 0; j < visible; ++j) {
        const K* key = k + (span.k_begin + j) * z.kv_heads * z.head_dim + kv;
        p[static_cast<size_t>(j)] = scale * dot<C>(q + (row * z.heads + head) * z.head_dim, key, z.head_dim);
        largest = std::max(largest, p[static_cast<size_t>(j)]);
      }
      std::fill(sum.begin(), sum.end(), C(0));
      for (int64_t j = 0; j < visible; ++j) {
        const C weight = exp_of(p[static_cast<size_t>(j)] - largest);
        total += weight;
        const K* value = v + (span.k_begin + j) * z.kv_heads * z.head_dim + kv;
        for (int64_t d = 0; d < z.head_dim; ++d) sum[static_cast<size_t>(d)] += weight * static_cast<C>(load(value, d));
      }
      for (int64_t d = 0; d < z.head_dim; ++d) {
        store(out, (row * z.heads + head) * z.head_dim + d, visible > 0 ? sum[static_cast<size_t>(d)] / total : C(0));
      }
      if (lse != nullptr) lse[head * z.queries + row] = largest + std::log(total);
    }
  });
}

template <class T, class K> void backward(const AttentionBackward& op) {
  using C = compute_t<T>;
  const Sizes<AttentionBackward> z(op);
  const T *q = op.q.data<T>(), *out = op.out.data<T>(), *dout = op.dout.data<T>();
  const K *k = op.k.data<K>(), *v = op.v.data<K>();
  const C* lse = op.lse.data<C>();
  T* dq = op.dq.data<T>();
  K *dk = op.dk.data<K>(), *dv = op.dv.data<K>();
  op.dq.fill_zero(), op.dk.fill_zero(), op.dv.fill_zero();
  const C scale = static_cast<C>(1 / std::sqrt(static_cast<double>(z.head_dim)));
  const int64_t width = z.head_dim;
  parallel_items(z.sequences * z.kv_heads, [&](int64_t item) {
    const int64_t kv_head = item % z.kv_heads;
    const Span span = span_of(op.sequences, item / z.kv_heads);
    const size_t key_elements = static_cast<size_t>(std::max<int64_t>(span.k_count, 0) * width);
    std::vector<C> dk_sum(key_elements, C(0)), dv_sum(key_elements, C(0)), dq_sum(static_cast<size_t>(width));
    for (int64_t head = kv_head * z.group; head < (kv_head + 1) * z.group; ++head) {
      for (int64_t row = span.q_begin; row < span.q_end; ++row) {
        const int64_t offset = (row * z.heads + head) * width;
        const C delta = dot<C>(out + offset, dout + offset, width);
        std::fill(dq_sum.begin(), dq_sum.end(), C(0));
        for (int64_t j = 0; j < span.visible(row); ++j) {
          const int64_t key = ((span.k_begin + j) * z.kv_heads + kv_head) * width;
          const C p = exp_of(scale * dot<C>(q + offset, k + key, width) - lse[head * z.queries + row]);
          const C ds = scale * p * (dot<C>(dout + offset, v + key, width) - delta);
          C *dk_row = dk_sum.data() + j * width, *dv_row = dv_sum.data() + j * width;
          for (int64_t d = 0; d < width; ++d) {
            dv_row[d] += p * load(dout, offset + d);
            dk_row[d] += ds * load(q, offset + d);
            dq_sum[static_cast<size_t>(d)] += ds * static_cast<C>(load(k, key + d));
          }
        }
        for (int64_t d = 0; d < width; ++d) store(dq, offset + d, dq_sum[static_cast<size_t>(d)]);
      }
    }
    for (int64_t j = 0; j < span.k_count; ++j) {
      const int64_t key = ((span.k_begin + j) * z.kv_heads + kv_head) * width;
      for (int64_t d = 0; d < width; ++d) {
        store(dk, key + d, static_cast<compute_t<K>>(dk_sum[static_cast<size_t>(j * width + d)]));
        store(dv, key + d, static_cast<compute_t<K>>(dv_sum[static_cast<size_t>(j * width + d)]));
      }
    }
  });
}

// f(T, K): the type of q and the type of k and v, which is the same or bf16 under f32.
template <class F> void visit_types(const char* op, DType q, DType kv, F&& f) {
  visit_floating(op, q, [&]<class T>() {
    if (kv == q) return f.template operator()<T, T>();
    if constexpr (std::is_same_v<T, float>) {
      if (kv == DType::kBF16) return f.template operator()<T, bf16>();
    }
    unsupported_dtype(op, kv);
  });
}

void forward_cpu(const Attention& op) {
  visit_types("attention", op.q.dtype(), op.k.dtype(), [&]<class T, class K>() { forward<T, K>(op); });
}
void backward_cpu(const AttentionBackward& op) {
  visit_types("attention_backward", op.q.dtype(), op.k.dtype(), [&]<class T, class K>() { backward<T, K>(op); });
}
const RegisterKernel<Attention> register_forward{DeviceKind::kCpu, &forward_cpu};
const RegisterKernel<AttentionBackward> register_backward{DeviceKind::kCpu, &backward_cpu};

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
    require(span.q_begin <= span.q_end && span.k_begin >= 0 && span.k_count >= 0 && span.k_begin + span.k_count <= op.k.dim(0),
            "{}: sequence {} has queries [{}, {}) and keys {} + {} of {}", name, n, span.q_begin, span.q_end, span.k_begin,
            span.k_count, op.k.dim(0));
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
