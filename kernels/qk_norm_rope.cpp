#include "kernels/qk_norm_rope.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/access.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kGrainElements = 16384;
constexpr int64_t kChunkRows =
    64;  // whose part of dw is summed at a time, so that its order does not depend on the threads

// cos and sin of positions. Packed rows repeat theirs, and sines cost more than everything else: one row of turns for each position up
// to the largest. Where positions stand far out, as in decoding, every row computes its own, with the same values.
template <class C>
class Turns {
 public:
  explicit Turns(const HeadTurns& turns) : positions_(turns.positions.data<int32_t>()), half_(turns.head_dim / 2) {
    for (int64_t i = 0; i < half_; ++i) {
      frequency_.push_back(std::pow(turns.theta, -2.0 * static_cast<double>(i) / static_cast<double>(2 * half_)));
    }
    const int64_t rows = turns.positions.dim(0);
    const int64_t count = rows == 0 ? 0 : *std::max_element(positions_, positions_ + rows) + int64_t{1};
    if (count > rows) return;
    table_.resize(static_cast<size_t>(count * 2 * half_));
    parallel_for(0, count, 4096 / (2 * half_) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) fill(p, table_.data() + p * 2 * half_);
    });
  }
  int64_t half() const { return half_; }
  // Cosines of row t, half() of them, then sines. own: memory for them.
  const C* of_row(int64_t t, std::vector<C>& own) const {
    if (!table_.empty()) return table_.data() + positions_[t] * 2 * half_;
    own.resize(static_cast<size_t>(2 * half_));
    fill(positions_[t], own.data());
    return own.data();
  }

 private:
  void fill(int64_t position, C* turns) const {
    for (int64_t i = 0; i < half_; ++i) {
      const double angle = static_cast<double>(position) * frequency_[static_cast<size_t>(i)];
      turns[i] = static_cast<C>(std::cos(angle));
      turns[half_ + i] = static_cast<C>(std::sin(angle));
    }
  }
  const int32_t* positions_;
  int64_t half_;
  std::vector<double> frequency_;
  std::vector<C> table_;
};

// out = in with all heads turned by direction * angle; out may be in.
template <class In, class Out, class C>
void rotate(const In* in, Out* out, int64_t width, int64_t half, const C* turns, C direction) {
  const C *cosine = turns, *sine = turns + half;
  for (int64_t head = 0; head < width; head += 2 * half) {
    const In *low = in + head, *high = low + half;
    Out *out_low = out + head, *out_high = out_low + half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const C a = load(low, i), b = load(high, i), s = direction * sine[i];
      store(out_low, i, a * cosine[i] - b * s);
      store(out_high, i, b * cosine[i] + a * s);
    }
  }
}

// v of row element i, in x's type.
template <class T, class W>
T normed(const T* x, const W* w, int64_t i, compute_t<T> rstd) {
  using C = compute_t<T>;
  return static_cast<T>(static_cast<C>(static_cast<T>(load(x, i) * rstd)) * static_cast<C>(load(w, i)));
}

template <class T, class W>
void forward_rows(const QkNormRope& op, const QkNormRope::Rows& rows, const Turns<compute_t<T>>& turns) {
  using C = compute_t<T>;
  const int64_t count = rows.x.dim(0), n = rows.x.dim(1);
  const T* all_x = rows.x.data<T>();
  const W* w = rows.w.data<W>();
  T* all_y = rows.y.data<T>();
  C* rstd = rows.rstd.defined() ? rows.rstd.data<C>() : nullptr;
  const C limit = static_cast<C>(op.limit);
  const bool limited = std::isfinite(op.limit);
  parallel_for(0, count, kGrainElements / (n + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<C> own;
    for (int64_t t = begin; t < end; ++t) {
      const T* x = all_x + t * n;
      T* y = all_y + t * n;
      C squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < n; ++i) squares += load(x, i) * load(x, i);
      const C r = C(1) / std::sqrt(squares / static_cast<C>(n) + static_cast<C>(op.eps));
      for (int64_t i = 0; i < n; ++i) y[i] = normed(x, w, i, r);
      for (int64_t i = 0; limited && i < n; ++i) store(y, i, std::min(std::max(load(y, i), -limit), limit));
      rotate(y, y, n, turns.half(), turns.of_row(t, own), C(1));
      if (rstd != nullptr) rstd[t] = r;
    }
  });
}

// One row: dv w into g, and dw += dv x rstd unless null.
template <class T, class W>
void gradient_of_normed(const T* x, const W* w, compute_t<T> rstd, compute_t<T> limit, int64_t n, compute_t<T>* g,
                        compute_t<T>* dw) {
  using C = compute_t<T>;
  for (int64_t i = 0; std::isfinite(limit) && i < n; ++i) {
    const C v = static_cast<C>(normed(x, w, i, rstd));
    if (v < -limit || v > limit) g[i] = 0;
  }
  for (int64_t i = 0; dw != nullptr && i < n; ++i) dw[i] += g[i] * load(x, i) * rstd;
  for (int64_t i = 0; i < n; ++i) g[i] *= static_cast<C>(load(w, i));
}

template <class T, class W>
void backward_rows(const QkNormRopeBackward& op, const QkNormRopeBackward::Rows& rows,
                   const Turns<compute_t<T>>& turns) {
  using C = compute_t<T>;
  const int64_t count = rows.x.dim(0), n = rows.x.dim(1), chunks = (count + kChunkRows - 1) / kChunkRows;
  const W* w = rows.w.data<W>();
  const C* rstd = rows.rstd.data<C>();
  std::vector<C> partial(rows.dw.defined() ? static_cast<size_t>(chunks * n) : 0, C(0));
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<C> own, g(static_cast<size_t>(n));
    for (int64_t t = begin * kChunkRows; t < std::min(count, end * kChunkRows); ++t) {
      const T* x = rows.x.data<T>() + t * n;
      T* dx = rows.dx.data<T>() + t * n;
      rotate(rows.dy.data<T>() + t * n, g.data(), n, turns.half(), turns.of_row(t, own), C(-1));
      C* dw = partial.empty() ? nullptr : partial.data() + t / kChunkRows * n;
      gradient_of_normed(x, w, rstd[t], static_cast<C>(op.limit), n, g.data(), dw);
      C dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < n; ++i) dot += g[static_cast<size_t>(i)] * load(x, i);
      const C r = rstd[t], correction = dot / static_cast<C>(n) * r * r;
      for (int64_t i = 0; i < n; ++i) store(dx, i, r * (g[static_cast<size_t>(i)] - load(x, i) * correction));
    }
  });
  for (int64_t c = 0; c < chunks && !partial.empty(); ++c) {
    C* dw = rows.dw.data<C>();
    for (int64_t i = 0; i < n; ++i) dw[i] += partial[static_cast<size_t>(c * n + i)];
  }
}

void forward_cpu(const QkNormRope& op) {
  visit_floating("qk_norm_rope", op.q.x.dtype(), [&]<class T>() {
    const Turns<compute_t<T>> turns(op.turns);
    visit_weight<T>("qk_norm_rope", op.q.w.dtype(), [&]<class W>() {
      forward_rows<T, W>(op, op.q, turns);
      if (op.k.x.defined()) forward_rows<T, W>(op, op.k, turns);
    });
  });
}
void backward_cpu(const QkNormRopeBackward& op) {
  visit_floating("qk_norm_rope_backward", op.q.x.dtype(), [&]<class T>() {
    const Turns<compute_t<T>> turns(op.turns);
    visit_weight<T>("qk_norm_rope_backward", op.q.w.dtype(), [&]<class W>() {
      backward_rows<T, W>(op, op.q, turns);
      if (op.k.x.defined()) backward_rows<T, W>(op, op.k, turns);
    });
  });
}
const RegisterKernel<QkNormRope> register_forward{DeviceKind::kCpu, &forward_cpu};
const RegisterKernel<QkNormRopeBackward> register_backward{DeviceKind::kCpu, &backward_cpu};

void check_turns(const char* op, const HeadTurns& turns, double limit) {
  require(turns.head_dim > 0 && turns.head_dim % 2 == 0, "{}: head_dim is {}, expected an even number", op,
          turns.head_dim);
  require(limit > 0, "{}: limit is {}, expected a positive number", op, limit);
}

// x, w and what every pass has beside them; first: of the queries.
void check_rows(const char* op, const HeadTurns& turns, const Tensor& x, const Tensor& w, const Tensor& first,
                const Tensor& first_w) {
  require(x.rank() == 2 && x.dim(1) % turns.head_dim == 0 && x.dim(1) > 0, "{}: x is {}, expected [T, H*{}]", op,
          x.shape(), turns.head_dim);
  require(x.dtype() == first.dtype() && w.dtype() == first_w.dtype(), "{}: queries {} and {}, keys {} and {}", op,
          name_of(first.dtype()), name_of(first_w.dtype()), name_of(x.dtype()), name_of(w.dtype()));
  require_tensor(w, op, "w", {x.dim(1)}, w.dtype());
  require_tensor(turns.positions, op, "positions", {x.dim(0)}, DType::kI32);
}

}  // namespace

void run(const QkNormRope& op) {
  constexpr const char* kName = "qk_norm_rope";
  check_turns(kName, op.turns, op.limit);
  for (const QkNormRope::Rows* rows : {&op.q, &op.k}) {
    if (rows == &op.k && !rows->x.defined()) continue;
    check_rows(kName, op.turns, rows->x, rows->w, op.q.x, op.q.w);
    require_tensor(rows->y, kName, "y", rows->x.shape(), rows->x.dtype());
    if (!rows->rstd.defined()) continue;
    require_tensor(rows->rstd, kName, "rstd", {rows->x.dim(0)}, accumulator_of(rows->x.dtype()));
  }
  dispatch(op, op.q.x.device(), kName);
}

void run(const QkNormRopeBackward& op) {
  constexpr const char* kName = "qk_norm_rope_backward";
  check_turns(kName, op.turns, op.limit);
  for (const QkNormRopeBackward::Rows* rows : {&op.q, &op.k}) {
    if (rows == &op.k && !rows->x.defined()) continue;
    const DType accumulator = accumulator_of(rows->x.dtype());
    check_rows(kName, op.turns, rows->x, rows->w, op.q.x, op.q.w);
    require_tensor(rows->rstd, kName, "rstd", {rows->x.dim(0)}, accumulator);
    require_tensor(rows->dy, kName, "dy", rows->x.shape(), rows->x.dtype());
    require_tensor(rows->dx, kName, "dx", rows->x.shape(), rows->x.dtype());
    if (rows->dw.defined()) require_tensor(rows->dw, kName, "dw", {rows->x.dim(1)}, accumulator);
  }
  dispatch(op, op.q.x.device(), kName);
}

}  // namespace lightmoe
