#include "kernels/qk_norm_rope.h"

#include "kernels/access.h"
#include "kernels/device/add_chunks.h"
#include "kernels/device/reduce.h"
#include "kernels/device/rows.h"
#include "kernels/device/turns.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kChunkRows = 16;  // whose part of dw one block adds up
constexpr int round_up_4(int n) { return (n + 3) / 4 * 4; }

// What a row needs of its position: the angle of element i of a head is that of its frequency.
struct Heads {
  const int32_t* positions;
  int half;
  double log2_theta;
};

// A block's shared memory behind the scratch: `rows` rows of padded width as f32, where every thread keeps the columns it owns, and the
// cosines and sines of one token.
struct SharedRows {
  float *row[3], *cosine, *sine;
  DEVICE_FN SharedRows(BlockScratch<>& scratch, int rows, int width, int half) {
    auto* next = reinterpret_cast<float*>(&scratch + 1);
    for (int i = 0; i < rows; ++i) row[i] = next, next += round_up_4(width);
    cosine = next, sine = next + half;
  }
};
size_t shared_for(int rows, int width, int half) {
  return sizeof(BlockScratch<>) + static_cast<size_t>(rows * round_up_4(width) + 2 * half) * sizeof(float);
}

// All threads; a barrier must follow.
DEVICE_FN void load_turns(const Heads& heads, int token, const SharedRows& shared) {
  const auto position = static_cast<double>(heads.positions[token]);
  for (int i = static_cast<int>(threadIdx.x); i < heads.half; i += static_cast<int>(blockDim.x)) {
    const double frequency = exp2(-heads.log2_theta * static_cast<double>(i) / static_cast<double>(heads.half));
    turn_by(position * frequency * 0.15915494309189535, &shared.cosine[i], &shared.sine[i]);
  }
}

// f(low, high, i) for the pairs of columns a thread owns: kV from `low` on and their partners from `high` on, of which those with
// i + k < half exist.
template <int kV, class F>
DEVICE_FN void for_each_pair(int width, int half, F&& f) {
  const int steps = ceil_div(half, kV), total = width / (2 * half) * steps;
  for (int step = static_cast<int>(threadIdx.x); step < total; step += static_cast<int>(blockDim.x)) {
    const int head = step / steps * 2 * half, i = step % steps * kV;
    f(head, head + half, i);
  }
}

template <int kV>
struct Pair {
  Floats<kV> low, high;
  template <class P>
  DEVICE_FN Pair(const P* row, int at_low, int at_high, int i, int half, bool aligned)
      : low(load_floats<kV>(row + at_low, i, half, aligned)), high(load_floats<kV>(row + at_high, i, half, aligned)) {}
  template <class P>
  DEVICE_FN void store(P* row, int at_low, int at_high, int i, int half, bool aligned) const {
    store_floats(row + at_low, i, half, aligned, low);
    store_floats(row + at_high, i, half, aligned, high);
  }
  DEVICE_FN void rotate(const SharedRows& shared, int i, int half, float direction) {
#pragma unroll
    for (int k = 0; k < kV; ++k) {
      const int j = i + k < half ? i + k : 0;
      const float a = low[k], b = high[k], c = shared.cosine[j], s = direction * shared.sine[j];
      low[k] = a * c - b * s;
      high[k] = b * c + a * s;
    }
  }
};

// v, rounded to x's type as HF does after each of the two products.
template <class T>
DEVICE_FN float normed(float x, float rstd, float w) {
  return to_float(from_float<T>(to_float(from_float<T>(x * rstd)) * w));
}

template <class T, class W>
struct ForwardRows {
  const T* x;
  const W* w;
  T* y;
  float* rstd;
  int width;
  bool aligned;
};
template <class T, class W>
struct BothForward {
  ForwardRows<T, W> part[2];
};

// One row of queries or of keys.
template <class T, class W>
__global__ void __launch_bounds__(kMaxRowThreads)
    qk_norm_rope_kernel(const __grid_constant__ BothForward<T, W> both, Heads heads, float eps, float limit) {
  constexpr int kV = kVector<T>;
  const ForwardRows<T, W>& p = both.part[blockIdx.y];
  auto& scratch = shared_memory<BlockScratch<>>();
  const SharedRows shared(scratch, 1, p.width, heads.half);
  const int half = heads.half, token = static_cast<int>(blockIdx.x);
  const int64_t row = static_cast<int64_t>(token) * p.width;
  load_turns(heads, token, shared);
  float squares = 0;
  for_each_pair<kV>(p.width, half, [&](int low, int high, int i) {
    const Pair<kV> x(p.x + row, low, high, i, half, p.aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k) squares += x.low[k] * x.low[k] + x.high[k] * x.high[k];
    x.store(shared.row[0], low, high, i, half, p.aligned);
  });
  squares = block_sum(squares, scratch);
  const float r = reciprocal_sqrt(squares / static_cast<float>(p.width) + eps);
  for_each_pair<kV>(p.width, half, [&](int low, int high, int i) {
    Pair<kV> v(shared.row[0], low, high, i, half, p.aligned);
    const Pair<kV> w(p.w, low, high, i, half, p.aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k) {
      v.low[k] = std::min(std::max(normed<T>(v.low[k], r, w.low[k]), -limit), limit);
      v.high[k] = std::min(std::max(normed<T>(v.high[k], r, w.high[k]), -limit), limit);
    }
    v.rotate(shared, i, half, 1);
    v.store(p.y + row, low, high, i, half, p.aligned);
  });
  if (p.rstd != nullptr && threadIdx.x == 0) p.rstd[token] = r;
}

template <class T, class W>
struct BackwardRows {
  const T *x, *dy;
  const W* w;
  const float* rstd;
  T* dx;
  float* partial;  // [chunk, padded width]: sums of dv x rstd, or null
  int width;
  bool aligned;
};
template <class T, class W>
struct BothBackward {
  BackwardRows<T, W> part[2];
};

// dv w in place of dy; dw += dv x rstd unless null.
template <class T, class W, int kV>
DEVICE_FN void differentiate(Floats<kV>& g, const Floats<kV>& x, const Floats<kV>& w, float r, float limit,
                             Floats<kV>& dw) {
#pragma unroll
  for (int k = 0; k < kV; ++k) {
    const float v = normed<T>(x[k], r, w[k]);
    if (v < -limit || v > limit) g[k] = 0;
    dw[k] += g[k] * x[k] * r;
    g[k] *= w[k];
  }
}

// Rows of a chunk one after the other.
template <class T, class W>
__global__ void __launch_bounds__(kMaxRowThreads)
    qk_norm_rope_backward_kernel(const __grid_constant__ BothBackward<T, W> both, Heads heads, float limit,
                                 int tokens) {
  constexpr int kV = kVector<T>;
  const BackwardRows<T, W>& p = both.part[blockIdx.y];
  auto& scratch = shared_memory<BlockScratch<>>();
  const SharedRows shared(scratch, 3, p.width, heads.half);
  float *kept_x = shared.row[0], *kept_g = shared.row[1], *dw = shared.row[2];
  const int half = heads.half, begin = static_cast<int>(blockIdx.x) * kChunkRows;
  for (int token = begin; token < std::min(begin + kChunkRows, tokens); ++token) {
    const int64_t row = static_cast<int64_t>(token) * p.width;
    const float r = p.rstd[token];
    load_turns(heads, token, shared);
    sync_block();
    float dot = 0;
    for_each_pair<kV>(p.width, half, [&](int low, int high, int i) {
      const Pair<kV> x(p.x + row, low, high, i, half, p.aligned), w(p.w, low, high, i, half, p.aligned);
      Pair<kV> g(p.dy + row, low, high, i, half, p.aligned);
      g.rotate(shared, i, half, -1);
      // Nobody has written dw before the first row.
      Pair<kV> sum(dw, low, high, i, token == begin ? 0 : half, p.aligned);
      differentiate<T, W>(g.low, x.low, w.low, r, limit, sum.low);
      differentiate<T, W>(g.high, x.high, w.high, r, limit, sum.high);
      sum.store(dw, low, high, i, half, p.aligned);
#pragma unroll
      for (int k = 0; k < kV; ++k) dot += g.low[k] * x.low[k] + g.high[k] * x.high[k];
      x.store(kept_x, low, high, i, half, p.aligned);
      g.store(kept_g, low, high, i, half, p.aligned);
    });
    dot = block_sum(dot, scratch);
    const float correction = dot / static_cast<float>(p.width) * r * r;
    for_each_pair<kV>(p.width, half, [&](int low, int high, int i) {
      const Pair<kV> x(kept_x, low, high, i, half, p.aligned);
      Pair<kV> g(kept_g, low, high, i, half, p.aligned);
#pragma unroll
      for (int k = 0; k < kV; ++k) {
        g.low[k] = r * (g.low[k] - x.low[k] * correction);
        g.high[k] = r * (g.high[k] - x.high[k] * correction);
      }
      g.store(p.dx + row, low, high, i, half, p.aligned);
    });
  }
  if (p.partial == nullptr) return;
  float* partial = p.partial + static_cast<int64_t>(blockIdx.x) * round_up_4(p.width);
  for_each_pair<kV>(p.width, half, [&](int low, int high, int i) {
    Pair<kV>(dw, low, high, i, half, p.aligned).store(partial, low, high, i, half, p.aligned);
  });
}

Heads heads_of(const HeadTurns& turns) {
  return {turns.positions.data<int32_t>(), static_cast<int>(turns.head_dim / 2), std::log2(turns.theta)};
}

template <class T, class W>
void forward(const QkNormRope& op) {
  const Heads heads = heads_of(op.turns);
  BothForward<T, W> both{};
  int widest = 0, count = 0;
  for (const QkNormRope::Rows* rows : {&op.q, &op.k}) {
    if (!rows->x.defined()) continue;
    ForwardRows<T, W>& p = both.part[count++];
    p = {.x = rows->x.data<T>(),
         .w = rows->w.data<W>(),
         .y = rows->y.data<T>(),
         .rstd = rows->rstd.defined() ? rows->rstd.data<float>() : nullptr,
         .width = static_cast<int>(rows->x.dim(1)),
         .aligned = false};
    p.aligned = aligned_rows(heads.half, p.x, p.y) && aligned_rows(heads.half, p.w);
    widest = std::max(widest, p.width);
  }
  launch<qk_norm_rope_kernel<T, W>>({.blocks = {uint32_t(op.q.x.dim(0)), uint32_t(count)},
                                     .threads = {row_threads(widest / 2, kVector<T>)},
                                     .shared_bytes = shared_for(1, widest, heads.half)},
                                    both, heads, static_cast<float>(op.eps), static_cast<float>(op.limit));
}

template <class T, class W>
void backward(const QkNormRopeBackward& op) {
  const Heads heads = heads_of(op.turns);
  const int tokens = static_cast<int>(op.q.x.dim(0)), chunks = ceil_div(tokens, kChunkRows);
  const MemoryScope scope(MemoryCategory::kScratch);
  BothBackward<T, W> both{};
  Tensor partial[2];
  int widest = 0, count = 0;
  for (const QkNormRopeBackward::Rows* rows : {&op.q, &op.k}) {
    if (!rows->x.defined()) continue;
    const int width = static_cast<int>(rows->x.dim(1));
    if (rows->dw.defined()) partial[count] = Tensor::empty({chunks, round_up_4(width)}, DType::kF32, kDevice);
    BackwardRows<T, W>& p = both.part[count];
    p = {.x = rows->x.data<T>(),
         .dy = rows->dy.data<T>(),
         .w = rows->w.data<W>(),
         .rstd = rows->rstd.data<float>(),
         .dx = rows->dx.data<T>(),
         .partial = rows->dw.defined() ? partial[count].data<float>() : nullptr,
         .width = width,
         .aligned = false};
    p.aligned = aligned_rows(heads.half, p.x, p.dy, p.dx) && aligned_rows(heads.half, p.w);
    widest = std::max(widest, width), ++count;
  }
  launch<qk_norm_rope_backward_kernel<T, W>>({.blocks = {uint32_t(chunks), uint32_t(count)},
                                              .threads = {row_threads(widest / 2, kVector<T>)},
                                              .shared_bytes = shared_for(3, widest, heads.half)},
                                             both, heads, static_cast<float>(op.limit), tokens);
  if (tokens == 0) return;
  count = 0;
  for (const QkNormRopeBackward::Rows* rows : {&op.q, &op.k}) {
    if (!rows->x.defined()) continue;
    const int width = static_cast<int>(rows->x.dim(1));
    if (rows->dw.defined()) {
      add_chunks(partial[count].data<float>(), rows->dw.data<float>(), chunks, width, round_up_4(width));
    }
    ++count;
  }
}

void forward_device(const QkNormRope& op) {
  visit_device_floating("qk_norm_rope", op.q.x.dtype(), [&]<class T>() {
    visit_weight<T>("qk_norm_rope", op.q.w.dtype(), [&]<class W>() { forward<T, W>(op); });
  });
}
void backward_device(const QkNormRopeBackward& op) {
  visit_device_floating("qk_norm_rope_backward", op.q.x.dtype(), [&]<class T>() {
    visit_weight<T>("qk_norm_rope_backward", op.q.w.dtype(), [&]<class W>() { backward<T, W>(op); });
  });
}
const RegisterKernel<QkNormRope> register_forward{kDevice, &forward_device};
const RegisterKernel<QkNormRopeBackward> register_backward{kDevice, &backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
