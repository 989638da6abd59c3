#include "kernels/router.h"

#include <cmath>
#include <limits>

#include "kernels/access.h"
#include "kernels/cpu_math.h"
#include "kernels/tile_product.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kGrainElements = 1 << 18;  // of the products: below this a second thread does not pay

int64_t row_grain(int64_t cost_of_row) {
  return std::max<int64_t>(4, kGrainElements / std::max<int64_t>(1, cost_of_row));
}

// <x_r, w_e> for a few rows and slots at once. One accumulator each, filled in order of the columns: the same bits for any tile.
template <int R, int S, class T, class W>
void logits_tile(const T* x, const W* w, int64_t width, compute_t<T>* logits, int64_t count) {
  using C = compute_t<T>;
  Vec<C> sum[R][S] = {};
  const int64_t whole = width / kLanes<C> * kLanes<C>;
  for (int64_t i = 0; i < whole; i += kLanes<C>) {
    Vec<C> factor[S];
    for (int s = 0; s < S; ++s) factor[s] = load_vec(w + s * width + i);
    for (int r = 0; r < R; ++r) {
      const Vec<C> value = load_vec(x + r * width + i);
      for (int s = 0; s < S; ++s) sum[r][s] += value * factor[s];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < S; ++s) {
      if (whole < width) {
        sum[r][s] += load_part(x + r * width + whole, width - whole) * load_part(w + s * width + whole, width - whole);
      }
      logits[r * count + s] = sum_lanes<C>(sum[r][s]);
    }
  }
}

template <int R, class T, class W>
void logits_of_rows(const T* x, const W* w, int64_t width, compute_t<T>* logits, int64_t count) {
  int64_t e = 0;
  for (; e + 4 <= count; e += 4) logits_tile<R, 4>(x, w + e * width, width, logits + e, count);
  for (; e < count; ++e) logits_tile<R, 1>(x, w + e * width, width, logits + e, count);
}

template <class C>
void softmax_kept(const C* logits, const uint8_t* removed, int64_t count, C* probs) {
  C largest = -std::numeric_limits<C>::infinity(), sum = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (removed == nullptr || !removed[e]) largest = std::max(largest, logits[e]);
  }
  for (int64_t e = 0; e < count; ++e) {
    probs[e] = exp_of(logits[e] - largest);
    if (removed != nullptr && removed[e]) probs[e] = 0;
    sum += probs[e];
  }
  for (int64_t e = 0; e < count; ++e) probs[e] /= sum;
}

// Strictly greater wins, so ties go to the lower slot. With NaN every comparison is false and the result is still K different slots.
template <class C>
void choose(const C* probs, const uint8_t* removed, int64_t count, int64_t top_k, int32_t* slots, C* gates) {
  for (int64_t k = 0; k < top_k; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; ++e) {
      if (removed != nullptr && removed[e]) continue;
      if (best >= 0 && !(probs[e] > probs[best])) continue;
      if (std::find(slots, slots + k, static_cast<int32_t>(e)) == slots + k) best = e;
    }
    slots[k] = static_cast<int32_t>(best);
    gates[k] = probs[best];
  }
}

template <class T, class W>
void forward(const Router& op) {
  using C = compute_t<T>;
  const int64_t width = op.x.dim(1), count = op.w.dim(0), top_k = op.top_k;
  const T* x = op.x.data<T>();
  const W* w = op.w.data<W>();
  const uint8_t* removed = op.removed.defined() ? op.removed.data<uint8_t>() : nullptr;
  C *logits = op.logits.data<C>(), *probs = op.probs.data<C>(), *gates = op.gates.data<C>();
  int32_t* slots = op.slots.data<int32_t>();
  parallel_for(0, op.x.dim(0), row_grain(width * count), [&](int64_t begin, int64_t end) {
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) logits_of_rows<4>(x + row * width, w, width, logits + row * count, count);
    for (; row < end; ++row) logits_of_rows<1>(x + row * width, w, width, logits + row * count, count);
    for (int64_t t = begin; t < end; ++t) {
      softmax_kept(logits + t * count, removed, count, probs + t * count);
      C* gate = gates + t * top_k;
      choose(probs + t * count, removed, count, top_k, slots + t * top_k, gate);
      if (!op.renormalize) continue;
      C sum = 0;
      for (int64_t k = 0; k < top_k; ++k) sum += gate[k];
      for (int64_t k = 0; k < top_k; ++k) gate[k] /= sum;
    }
  });
}

template <class C>
struct RowGradients {
  const C *probs, *dgates, *dprobs;  // of one token; dgates, dprobs may be null
  const int32_t* slots;
};

// dp = dprobs + the gates' gradient scattered to the chosen slots.
template <class C>
void gather_dp(const RowGradients<C>& row, int64_t count, int64_t top_k, bool renormalize, C* dp) {
  for (int64_t e = 0; e < count; ++e) dp[e] = row.dprobs != nullptr ? row.dprobs[e] : C(0);
  if (row.dgates == nullptr) return;
  C sum = 1, mean = 0;  // g = p / sum with sum = 1 and no mean to subtract when the gates are not renormalised
  if (renormalize) {
    sum = 0;
    for (int64_t k = 0; k < top_k; ++k) sum += row.probs[row.slots[k]];
    for (int64_t k = 0; k < top_k; ++k) mean += row.dgates[k] * row.probs[row.slots[k]] / sum;
  }
  for (int64_t k = 0; k < top_k; ++k) dp[row.slots[k]] += (row.dgates[k] - mean) / sum;
}

template <class C>
void softmax_backward(const RouterBackward& op, C* dlogits) {
  const bool gated = op.dgates.defined();
  const int64_t count = op.probs.dim(1), top_k = gated ? op.slots.dim(1) : 0;
  const C* probs = op.probs.data<C>();
  const C *dgates = gated ? op.dgates.data<C>() : nullptr,
          *dprobs = op.dprobs.defined() ? op.dprobs.data<C>() : nullptr;
  const int32_t* slots = gated ? op.slots.data<int32_t>() : nullptr;
  parallel_for(0, op.probs.dim(0), row_grain(8 * count), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      C* d = dlogits + t * count;
      const C* p = probs + t * count;
      gather_dp<C>({p, gated ? dgates + t * top_k : nullptr, dprobs != nullptr ? dprobs + t * count : nullptr,
                    slots + t * top_k},
                   count, top_k, op.renormalize, d);
      C mean = 0;
      for (int64_t e = 0; e < count; ++e) mean += p[e] * d[e];
      for (int64_t e = 0; e < count; ++e) d[e] = p[e] * (d[e] - mean);
    }
  });
}

constexpr int64_t kPanelWidth = 64;  // columns of a panel: four vectors of f32
constexpr int64_t kPanelRows = 256;

// dx = dlogits W, a panel of columns of W at a time.
template <class T, class W>
void input_gradient(const RouterBackward& op, const compute_t<T>* dlogits) {
  using C = compute_t<T>;
  const int64_t width = op.dx.dim(1), count = op.w.dim(0);
  const W* w = op.w.data<W>();
  T* dx = op.dx.data<T>();
  parallel_for(0, op.dx.dim(0), row_grain(width * count), [&](int64_t begin, int64_t end) {
    std::vector<C> panel(static_cast<size_t>(count * kPanelWidth)),
        product(static_cast<size_t>(kPanelRows * kPanelWidth));
    for (int64_t column = 0; column < width; column += kPanelWidth) {
      const int64_t columns = std::min(kPanelWidth, width - column), padded = round_up(columns, kLanes<C>);
      copy_tile(w + column, width, count, columns, C(1), panel.data(), kPanelWidth);
      for (int64_t row = begin; row < end; row += kPanelRows) {
        const int64_t rows = std::min(kPanelRows, end - row);
        tile_product<C>(rows, padded, count, {dlogits + row * count, count, 1}, panel.data(), kPanelWidth,
                        {product.data(), kPanelWidth, false});
        for (int64_t r = 0; r < rows; ++r) {
          T* out = dx + (row + r) * width + column;
          const C* from = product.data() + r * kPanelWidth;
          if (op.accumulate_dx) {
            for (int64_t i = 0; i < columns; ++i) store(out, i, load(out, i) + from[i]);
          } else {
            for (int64_t i = 0; i < columns; ++i) store(out, i, from[i]);
          }
        }
      }
    }
  });
}

// dw += dlogits^T x. Threads own columns, so the sum over t has one order.
template <class T, class W>
void weight_gradient(const RouterBackward& op, const compute_t<T>* dlogits) {
  using C = compute_t<T>;
  const int64_t rows = op.x.dim(0), width = op.x.dim(1), count = op.dw.dim(0);
  const T* x = op.x.data<T>();
  W* dw = op.dw.data<W>();
  const int64_t panels = (width + kPanelWidth - 1) / kPanelWidth;
  const int64_t panel_grain = kGrainElements / (rows * kPanelWidth * count + 1) + 1;
  parallel_for(0, panels, panel_grain, [&](int64_t begin, int64_t end) {
    std::vector<C> panel(static_cast<size_t>(kPanelRows * kPanelWidth)), sum(static_cast<size_t>(count * kPanelWidth));
    for (int64_t column = begin * kPanelWidth; column < std::min(width, end * kPanelWidth); column += kPanelWidth) {
      const int64_t columns = std::min(kPanelWidth, width - column), padded = round_up(columns, kLanes<C>);
      std::fill(sum.begin(), sum.end(), C(0));
      for (int64_t row = 0; row < rows; row += kPanelRows) {
        const int64_t depth = std::min(kPanelRows, rows - row);
        copy_tile(x + row * width + column, width, depth, columns, C(1), panel.data(), kPanelWidth);
        tile_product<C>(count, padded, depth, {dlogits + row * count, 1, count}, panel.data(), kPanelWidth,
                        {sum.data(), kPanelWidth, true});
      }
      for (int64_t e = 0; e < count; ++e) {
        W* out = dw + e * width + column;
        const C* from = sum.data() + e * kPanelWidth;
        for (int64_t i = 0; i < columns; ++i) {
          store(out, i, static_cast<compute_t<W>>(static_cast<C>(load(out, i)) + from[i]));
        }
      }
    }
  });
}

template <class T>
void backward(const RouterBackward& op) {
  using C = compute_t<T>;
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor dlogits = Tensor::empty(op.probs.shape(), dtype_of<C>);
  softmax_backward(op, dlogits.data<C>());
  if (op.dw.defined()) {
    visit_weight<T>("router_backward", op.dw.dtype(), [&]<class W>() { weight_gradient<T, W>(op, dlogits.data<C>()); });
  }
  if (op.dx.defined()) {
    visit_weight<T>("router_backward", op.w.dtype(), [&]<class W>() { input_gradient<T, W>(op, dlogits.data<C>()); });
  }
}

void forward_cpu(const Router& op) {
  visit_floating("router", op.x.dtype(),
                 [&]<class T>() { visit_weight<T>("router", op.w.dtype(), [&]<class W>() { forward<T, W>(op); }); });
}
void backward_cpu(const RouterBackward& op) {
  visit_floating("router_backward", op.x.dtype(), [&]<class T>() { backward<T>(op); });
}
const RegisterKernel<Router> register_forward{DeviceKind::kCpu, &forward_cpu};
const RegisterKernel<RouterBackward> register_backward{DeviceKind::kCpu, &backward_cpu};

}  // namespace

void run(const Router& op) {
  check_router(op);
  dispatch(op, op.x.device(), "router");
}

void check_router(const Router& op) {
  require(op.x.rank() == 2, "router: x is {}, expected [T, D]", op.x.shape());
  require(op.w.rank() == 2, "router: w is {}, expected [E, D]", op.w.shape());
  const int64_t rows = op.x.dim(0), count = op.w.dim(0);
  const DType accumulator = accumulator_of(op.x.dtype());
  require_tensor(op.w, "router", "w", {count, op.x.dim(1)}, op.w.dtype());
  require_tensor(op.logits, "router", "logits", {rows, count}, accumulator);
  require_tensor(op.probs, "router", "probs", {rows, count}, accumulator);
  require_tensor(op.slots, "router", "slots", {rows, op.top_k}, DType::kI32);
  require_tensor(op.gates, "router", "gates", {rows, op.top_k}, accumulator);
  int64_t kept = count;
  if (op.removed.defined()) {
    require_tensor(op.removed, "router", "removed", {count}, DType::kU8);
    if (op.removed.device() == DeviceKind::kCpu) {
      kept = std::count(op.removed.data<uint8_t>(), op.removed.data<uint8_t>() + count, uint8_t{0});
    }
  }
  require(op.top_k >= 1 && op.top_k <= kept, "router: top_k is {} with {} of {} slots kept", op.top_k, kept, count);
}

void run(const RouterBackward& op) {
  require(op.x.rank() == 2 && op.w.rank() == 2, "router_backward: x is {}, w is {}, expected [T, D] and [E, D]",
          op.x.shape(), op.w.shape());
  const int64_t rows = op.x.dim(0), width = op.x.dim(1), count = op.w.dim(0);
  const DType accumulator = accumulator_of(op.x.dtype());
  require_tensor(op.w, "router_backward", "w", {count, width}, op.w.dtype());
  require_tensor(op.probs, "router_backward", "probs", {rows, count}, accumulator);
  if (op.dprobs.defined()) require_tensor(op.dprobs, "router_backward", "dprobs", {rows, count}, accumulator);
  if (op.dgates.defined()) {
    require(op.slots.rank() == 2, "router_backward: slots is {}, expected [T, K]", op.slots.shape());
    require_tensor(op.slots, "router_backward", "slots", {rows, op.slots.dim(1)}, DType::kI32);
    require_tensor(op.dgates, "router_backward", "dgates", op.slots.shape(), accumulator);
  }
  if (op.dx.defined()) require_tensor(op.dx, "router_backward", "dx", op.x.shape(), op.x.dtype());
  if (op.dw.defined()) require_tensor(op.dw, "router_backward", "dw", op.w.shape(), op.dw.dtype());
  dispatch(op, op.x.device(), "router_backward");
}

}  // namespace lightmoe
