#include "kernels/router_dispatch.h"

#include "kernels/access.h"
#include "kernels/device/reduce.h"
#include "kernels/device/vector.h"
#include "kernels/dispatch_device.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kWarps = 8;  // of a block of the forward kernel
constexpr int kThreads = 32 * kWarps;
constexpr int kTokens = kDispatchTokens;  // of that block
constexpr int kTileSlots = 64;            // whose logits are summed at once
constexpr int kDepth = 16;                // columns of x a warp takes at a time
constexpr int kSide = 64;                 // of the backward products' tiles
constexpr int kSideDepth = 16;
constexpr int kChunkTokens = 1024;  // whose part of dw one block adds up
constexpr int kMaxSlots = 1024;     // 32 for each lane: the chosen ones are bits of a word

struct LogitTiles {
  struct Slab {
    float x[kDepth][kTokens], w[kDepth][kTileSlots];
  } warp[kWarps];
  float sum[kTokens][kTileSlots];
};

template <class T, class W>
struct Columns {
  Floats<kDepth> x, w[2];
  DEVICE_FN Columns(const T* x_row, const W* w_row, const W* next_w_row, int column, int width, bool aligned)
      : x(load_floats<kDepth>(x_row, column, x_row == nullptr ? 0 : width, aligned)),
        w{load_floats<kDepth>(w_row, column, w_row == nullptr ? 0 : width, aligned),
          load_floats<kDepth>(next_w_row, column, next_w_row == nullptr ? 0 : width, aligned)} {}
};

// What the columns of one slab add to the tile: a lane owns eight tokens and eight slots.
DEVICE_FN void add_slab(const LogitTiles::Slab& slab, float (&sum)[8][8]) {
  const int token = lane_id() / 8 * 8, slot = lane_id() % 8 * 4;
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    const auto x = load_floats<8>(slab.x[d], token, kTokens, true);
    const auto low = load_floats<4>(slab.w[d], slot, kTileSlots, true);
    const auto high = load_floats<4>(slab.w[d], slot + 32, kTileSlots, true);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[i][j] += x[i] * low[j];
        sum[i][j + 4] += x[i] * high[j];
      }
    }
  }
}

// tiles.sum = x W^T for 32 tokens and 64 slots. Warp v takes columns [16 v, 16 v + 16), [16 (v + 8), ..): the sums are added in order
// of the warps, so that a logit has the same bits in any tile.
template <class T, class W>
DEVICE_FN void logits_tile(const T* x, const W* w, int rows, int slots, int width, bool aligned, LogitTiles& tiles) {
  LogitTiles::Slab& slab = tiles.warp[warp_id()];
  const int lane = lane_id();
  const T* x_row = lane < rows ? x + static_cast<int64_t>(lane) * width : nullptr;
  const W* w_row = lane < slots ? w + static_cast<int64_t>(lane) * width : nullptr;
  const W* next_w_row = lane + 32 < slots ? w + static_cast<int64_t>(lane + 32) * width : nullptr;
  float sum[8][8] = {};
  Columns<T, W> next(x_row, w_row, next_w_row, warp_id() * kDepth, width, aligned);
  for (int column = warp_id() * kDepth; column < width; column += kWarps * kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      slab.x[d][lane] = next.x[d];
      slab.w[d][lane] = next.w[0][d], slab.w[d][lane + 32] = next.w[1][d];
    }
    sync_warp();
    next = Columns<T, W>(x_row, w_row, next_w_row, column + kWarps * kDepth, width, aligned);
    add_slab(slab, sum);
    sync_warp();
  }
  for (int turn = 0; turn < kWarps; ++turn) {
    if (turn == warp_id()) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& total = tiles.sum[lane / 8 * 8 + i][lane % 8 * 4 + (j < 4 ? j : j + 28)];
          total = turn == 0 ? sum[i][j] : total + sum[i][j];
        }
      }
    }
    sync_block();
  }
}

struct RouterSizes {
  int tokens, width, slots, top_k;
  bool renormalize, aligned;
};

// probs of one token, by one warp; a lane reads and writes slots lane, lane + 32, ...
DEVICE_FN void softmax_kept(const float* logits, const uint8_t* removed, int slots, float* probs) {
  float largest = -INFINITY, sum = 0;
  for (int e = lane_id(); e < slots; e += 32) {
    if (removed == nullptr || !removed[e]) largest = std::max(largest, logits[e]);
  }
  largest = warp_max(largest);
  for (int e = lane_id(); e < slots; e += 32) {
    const float p = removed == nullptr || !removed[e] ? std::exp(logits[e] - largest) : 0.0f;
    probs[e] = p;
    sum += p;
  }
  sum = warp_sum(sum);
  for (int e = lane_id(); e < slots; e += 32) probs[e] /= sum;
}

// The bits of numbers >= 0 are in the order of the numbers, so integers can be compared; 0 stands for a slot not to be chosen.
DEVICE_FN void choose(const float* probs, const uint8_t* removed, const RouterSizes& n, int32_t* slots, float* gates) {
  unsigned taken = 0;
  float sum = 0;
  for (int k = 0; k < n.top_k; ++k) {
    unsigned best = 0;
    int slot = n.slots;
    for (int e = lane_id(), i = 0; e < n.slots; e += 32, ++i) {
      if ((taken >> i & 1) != 0 || (removed != nullptr && removed[e])) continue;
      const unsigned key = (std::bit_cast<unsigned>(probs[e]) & 0x7fffffffu) + 1;
      if (key > best) best = key, slot = e;
    }
    const unsigned largest = reduce_max(best);
    slot = reduce_min(best == largest ? slot : n.slots);  // ties to the lower slot
    if (slot % 32 == lane_id()) taken |= 1u << slot / 32;
    const float gate = std::bit_cast<float>(largest - 1);
    sum += gate;
    if (lane_id() == 0) slots[k] = slot, gates[k] = gate;
  }
  sync_warp();
  for (int k = lane_id(); n.renormalize && k < n.top_k; k += 32) gates[k] /= sum;
}

// What the block's tokens chose, in the dispatch plan: counts of the chunk, or the whole plan where there is no other chunk.
DEVICE_FN void dispatch_chosen(const DispatchLaunch& plan, const int32_t* slots) {
  sync_block();  // all slots are chosen, and nobody reads the logits' tiles any more
  auto& shared = shared_memory<DispatchShared>();
  const int chunk = static_cast<int>(blockIdx.x);
  dispatch_count(plan.table, plan.n, slots, chunk, shared);
  if (plan.counts != nullptr) {
    for (int b = static_cast<int>(threadIdx.x); b < plan.n.bins(); b += kThreads) {
      plan.counts[static_cast<int64_t>(b) * plan.n.chunks + chunk] = shared.count[b];
    }
  } else if (warp_id() == 0) {
    dispatch_offsets(plan.table, plan.n, plan.offsets, shared);
    sync_warp();
    dispatch_place(plan.n, slots, chunk, plan.offsets, nullptr, 0, plan.lists, shared);
  }
}

template <class T, class W, bool kDispatch>
__global__ void __launch_bounds__(kThreads)
    router_kernel(const T* x, const W* w, const uint8_t* removed, float* logits, float* probs, int32_t* all_slots,
                  float* gates, RouterSizes n, const __grid_constant__ DispatchLaunch plan) {
  auto& tiles = shared_memory<LogitTiles>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int rows = static_cast<int>(std::min<int64_t>(kTokens, n.tokens - first));
  logits += first * n.slots, probs += first * n.slots, gates += first * n.top_k;
  int32_t* slots = all_slots + first * n.top_k;
  for (int slot = 0; slot < n.slots; slot += kTileSlots) {
    const int count = std::min(int{kTileSlots}, n.slots - slot);
    logits_tile(x + first * n.width, w + static_cast<int64_t>(slot) * n.width, rows, count, n.width, n.aligned, tiles);
    for (int i = static_cast<int>(threadIdx.x); i < rows * kTileSlots; i += kThreads) {
      const int row = i / kTileSlots, column = i % kTileSlots;
      if (column < count) logits[row * n.slots + slot + column] = tiles.sum[row][column];
    }
    sync_block();
  }
  for (int row = warp_id(); row < rows; row += kWarps) {
    softmax_kept(logits + row * n.slots, removed, n.slots, probs + row * n.slots);
    choose(probs + row * n.slots, removed, n, slots + row * n.top_k, gates + row * n.top_k);
  }
  if constexpr (kDispatch) dispatch_chosen(plan, all_slots);
}

// --- backward --------------------------------------------------------------------------------------

struct RowGradients {
  const float *probs, *dgates, *dprobs;  // dgates, dprobs may be null
  const int32_t* slots;
};

// dlogits = p (dp - <p, dp>), dp = dprobs + the gates' gradient at the chosen slots; one token by one warp.
__global__ void __launch_bounds__(kThreads)
    router_dlogits_kernel(RowGradients from, float* dlogits, int tokens, int count, int top_k, bool renormalize) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (t >= tokens) return;
  const float *p = from.probs + t * count, *dgates = from.dgates + t * top_k;
  const int32_t* slots = from.slots + t * top_k;
  float* d = dlogits + t * count;
  float sum = 1, mean = 0;  // g = p / sum with sum = 1 and no mean to subtract when the gates are not renormalised
  if (from.dgates == nullptr) top_k = 0;
  if (renormalize && top_k > 0) {
    sum = 0;
    for (int k = 0; k < top_k; ++k) sum += p[slots[k]];
    for (int k = 0; k < top_k; ++k) mean += dgates[k] * p[slots[k]] / sum;
  }
  float dot = 0;
  for (int e = lane_id(); e < count; e += 32) {
    float dp = from.dprobs != nullptr ? from.dprobs[t * count + e] : 0.0f;
    for (int k = 0; k < top_k; ++k) {
      if (slots[k] == e) dp += (dgates[k] - mean) / sum;
    }
    d[e] = dp;
    dot += p[e] * dp;
  }
  dot = warp_sum(dot);
  for (int e = lane_id(); e < count; e += 32) d[e] = p[e] * (d[e] - dot);
}

struct ProductTiles {
  float a[kSideDepth][kSide], b[kSideDepth][kSide];
};

// c[m, n] = sum over k of a[m, k] b[k, n], a given as [k, m] if kTransposed. Block z adds up k in [z chunk, (z + 1) chunk) into the
// z-th c. Every thread owns 4 x 4 elements.
template <bool kTransposed, class B, class C>
__global__ void __launch_bounds__(256)
    router_product_kernel(const float* a, const B* b, C* c, int m, int n, int k, int chunk, bool accumulate) {
  auto& tile = shared_memory<ProductTiles>();
  const int thread = static_cast<int>(threadIdx.x), row = thread / 16 * 4, column = thread % 16 * 4;
  const int first_m = static_cast<int>(blockIdx.y) * kSide, first_n = static_cast<int>(blockIdx.x) * kSide;
  const int begin = static_cast<int>(blockIdx.z) * chunk, end = std::min(begin + chunk, k);
  float sum[4][4] = {};
  for (int depth = begin; depth < end; depth += kSideDepth) {
    for (int i = thread; i < kSide * kSideDepth; i += 256) {
      const int d = kTransposed ? i / kSide : i % kSideDepth, r = kTransposed ? i % kSide : i / kSideDepth;
      const int64_t at_k = depth + d, at_m = first_m + r;
      const bool inside = at_k < end && at_m < m;
      tile.a[d][r] = inside ? a[kTransposed ? at_k * m + at_m : at_m * k + at_k] : 0.0f;
    }
    for (int i = thread; i < kSide * kSideDepth; i += 256) {
      const int d = i / kSide, at_n = first_n + i % kSide;
      const bool inside = depth + d < end && at_n < n;
      tile.b[d][i % kSide] = inside ? to_float(b[static_cast<int64_t>(depth + d) * n + at_n]) : 0.0f;
    }
    sync_block();
#pragma unroll
    for (int d = 0; d < kSideDepth; ++d) {
      const auto left = load_floats<4>(tile.a[d], row, kSide, true),
                 right = load_floats<4>(tile.b[d], column, kSide, true);
#pragma unroll
      for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] += left[i / 4] * right[i % 4];
    }
    sync_block();
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int64_t at_m = first_m + row + i / 4, at_n = first_n + column + i % 4;
    if (at_m >= m || at_n >= n) continue;
    C* out = c + (static_cast<int64_t>(blockIdx.z) * m + at_m) * n + at_n;
    *out = from_float<C>(sum[i / 4][i % 4] + (accumulate ? to_float(*out) : 0.0f));
  }
}

template <class W>
__global__ void __launch_bounds__(256) add_chunks_kernel(const float* partial, W* dw, int chunks, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  float sum = 0;
  for (int c = 0; c < chunks; ++c) sum += partial[c * count + i];
  dw[i] = from_float<W>(to_float(dw[i]) + sum);
}

uint32_t tiles_of(int64_t count) { return static_cast<uint32_t>(ceil_div(count, kSide)); }

template <class T, class W, bool kDispatch>
void forward(const Router& op, const DispatchLaunch& plan) {
  const T* x = op.x.data<T>();
  const W* w = op.w.data<W>();
  const RouterSizes n{.tokens = static_cast<int>(op.x.dim(0)),
                      .width = static_cast<int>(op.x.dim(1)),
                      .slots = static_cast<int>(op.w.dim(0)),
                      .top_k = static_cast<int>(op.top_k),
                      .renormalize = op.renormalize,
                      .aligned = aligned_rows(op.x.dim(1), x) && aligned_rows(op.x.dim(1), w)};
  check(n.slots <= kMaxSlots, ErrorKind::kDevice, "router: {} slots, on {} at most {}", n.slots, name_of(kDevice),
        kMaxSlots);
  launch<router_kernel<T, W, kDispatch>>(
      {.blocks = {static_cast<uint32_t>(ceil_div(n.tokens, kTokens))},
       .threads = {kThreads},
       .shared_bytes = std::max(sizeof(LogitTiles), kDispatch ? dispatch_shared_bytes(op.top_k) : 0)},
      x, w, op.removed.defined() ? op.removed.data<uint8_t>() : nullptr, op.logits.data<float>(),
      op.probs.data<float>(), op.slots.data<int32_t>(), op.gates.data<float>(), n, plan);
}

template <class T, class W>
void weight_gradient(const RouterBackward& op, const float* dlogits) {
  const int tokens = static_cast<int>(op.x.dim(0)), width = static_cast<int>(op.x.dim(1));
  const int count = static_cast<int>(op.dw.dim(0)), chunks = ceil_div(tokens, kChunkTokens);
  const Tensor partial = Tensor::empty({chunks, count, width}, DType::kF32, kDevice);
  launch<router_product_kernel<true, T, float>>({.blocks = {tiles_of(width), tiles_of(count), uint32_t(chunks)},
                                                 .threads = {256},
                                                 .shared_bytes = sizeof(ProductTiles)},
                                                dlogits, op.x.data<T>(), partial.data<float>(), count, width, tokens,
                                                kChunkTokens, false);
  launch<add_chunks_kernel<W>>({.blocks = {uint32_t(ceil_div(op.dw.numel(), 256))}, .threads = {256}},
                               partial.data<float>(), op.dw.data<W>(), chunks, op.dw.numel());
}

template <class T, class W>
void input_gradient(const RouterBackward& op, const float* dlogits) {
  const int tokens = static_cast<int>(op.dx.dim(0)), width = static_cast<int>(op.dx.dim(1));
  const int count = static_cast<int>(op.w.dim(0));
  launch<router_product_kernel<false, W, T>>(
      {.blocks = {tiles_of(width), tiles_of(tokens)}, .threads = {256}, .shared_bytes = sizeof(ProductTiles)}, dlogits,
      op.w.data<W>(), op.dx.data<T>(), tokens, width, count, count, op.accumulate_dx);
}

template <class T>
void backward(const RouterBackward& op) {
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor dlogits = Tensor::empty(op.probs.shape(), DType::kF32, kDevice);
  const int tokens = static_cast<int>(op.probs.dim(0)), count = static_cast<int>(op.probs.dim(1));
  const bool gated = op.dgates.defined();
  const RowGradients from{.probs = op.probs.data<float>(),
                          .dgates = gated ? op.dgates.data<float>() : nullptr,
                          .dprobs = op.dprobs.defined() ? op.dprobs.data<float>() : nullptr,
                          .slots = gated ? op.slots.data<int32_t>() : nullptr};
  launch<router_dlogits_kernel>({.blocks = {uint32_t(ceil_div(tokens, kWarps))}, .threads = {kThreads}}, from,
                                dlogits.data<float>(), tokens, count, gated ? static_cast<int>(op.slots.dim(1)) : 0,
                                op.renormalize);
  if (op.dw.defined()) {
    visit_weight<T>("router_backward", op.dw.dtype(),
                    [&]<class W>() { weight_gradient<T, W>(op, dlogits.data<float>()); });
  }
  if (op.dx.defined()) {
    visit_weight<T>("router_backward", op.w.dtype(),
                    [&]<class W>() { input_gradient<T, W>(op, dlogits.data<float>()); });
  }
}

void forward_device(const Router& op) {
  visit_device_floating("router", op.x.dtype(), [&]<class T>() {
    visit_weight<T>("router", op.w.dtype(), [&]<class W>() { forward<T, W, false>(op, DispatchLaunch{}); });
  });
}
void forward_dispatch_device(const RouterDispatch& op) {
  Tensor counts;
  const DispatchLaunch plan = dispatch_launch(op.fill, counts);
  visit_device_floating("router", op.router.x.dtype(), [&]<class T>() {
    visit_weight<T>("router", op.router.w.dtype(), [&]<class W>() { forward<T, W, true>(op.router, plan); });
  });
  finish_dispatch(plan, op.router.slots.data<int32_t>());
}
void backward_device(const RouterBackward& op) {
  visit_device_floating("router_backward", op.x.dtype(), [&]<class T>() { backward<T>(op); });
}
const RegisterKernel<Router> register_forward{kDevice, &forward_device};
const RegisterKernel<RouterDispatch> register_dispatch{kDevice, &forward_dispatch_device};
const RegisterKernel<RouterBackward> register_backward{kDevice, &backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
