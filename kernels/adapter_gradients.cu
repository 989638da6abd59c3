#include "kernels/adapter_gradient_strip.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

// Gradients of one slot's matrices in the columns of one chunk, by one block that goes over all pairs of the slot in order. h, a and dh are
// made again from h0 and u; a warp owns 16 columns, so that only u and e are shared between warps.
constexpr int kRankFragments = kMaxRank / 8;

template <class E>
struct GradientShared {
  ChainMatrices<E> matrices;
  E u[kStripRows][2 * kMaxRank + kPad], e[kStripRows][kMaxRank + kPad];
  E dh[kStripRows][2 * kTileColumns + kPad], a[kStripRows][kTileColumns + kPad];  // a times the gate
  StripPairs strip;
};

struct GradientTargets {
  float *b_gate[kMaxSlots], *b_up[kMaxSlots], *a_down[kMaxSlots];  // null: not wanted
  float beta[3];
};

template <class E>
DEVICE_FN void make_operands(GradientShared<E>& shared, const StripGradient<E>& at, int own_column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = strip_row(half);
    const float gate = shared.strip.gate[row];
#pragma unroll
    for (int e = 0; e < 2 * kFragments; ++e) {
      const int j = e / 2, i = 2 * half + e % 2, column = own_column + strip_column(j) + e % 2;
      const StripElement d = at.element(j, i, gate);
      shared.dh[row][column] = from_float<E>(d.dgate);
      shared.dh[row][kTileColumns + column] = from_float<E>(d.dup);
      shared.a[row][column] = from_float<E>(gate * d.a);
    }
  }
}

// to[c * column_stride + r * rank_stride] = beta to[..] + sum, c the warp's columns from `column` on, r < rank.
DEVICE_FN void store_gradient(float* to, const float (&sum)[kRankFragments][4], float beta, int column, int width,
                              int rank, int column_stride, int rank_stride) {
  if (to == nullptr) return;
#pragma unroll
  for (int e = 0; e < 4 * kRankFragments; ++e) {
    const int c = column + strip_row(e % 4 / 2), r = strip_column(e / 4) + e % 2;
    if (c >= width || r >= rank) continue;
    float& out = to[static_cast<int64_t>(c) * column_stride + static_cast<int64_t>(r) * rank_stride];
    out = sum[e / 4][e % 4] + (beta == 0 ? 0.0f : beta * out);
  }
}

template <class E, class W>
__global__ void __launch_bounds__(kTileThreads, 1)
    adapter_gradients_kernel(const __grid_constant__ ChainPlan p, const __grid_constant__ GradientTargets to,
                             const E* h0, const E* u, const E* ds, const E* e) {
  auto& shared = shared_memory<GradientShared<E>>();
  const int slot = static_cast<int>(blockIdx.y);
  int column = static_cast<int>(blockIdx.x) * kTileColumns;
  const int rank = p.rank[slot], own_column = warp_id() * 8 * kFragments, end = p.slot_offsets[slot + 1];
  if (rank == 0) return;  // the whole block
  const int columns = pad_16(rank);
  load_matrices<W>(shared.matrices, p, slot, column);
  float b_gate[kRankFragments][4] = {}, b_up[kRankFragments][4] = {}, a_down[kRankFragments][4] = {};
  for (int pair = p.slot_offsets[slot]; pair < end; pair += kStripRows) {
    load_strip(shared.strip, p, 0, pair, end);
    load_strip_rows(shared.u[0], 2 * kMaxRank + kPad, u, 2 * p.rank_stride, rank, true, pair, end);
    load_strip_rows(shared.e[0], kMaxRank + kPad, e, p.rank_stride, rank, false, pair, end);
    sync_block();
    StripGradient<E> at(p, shared.strip, h0, ds, column + own_column);
    at.add_low_rank(shared.u, shared.e, shared.matrices, rank, own_column);
    make_operands(shared, at, own_column);
    sync_warp();
    const StripOperand<E> dgate{shared.dh[0] + own_column, 2 * kTileColumns + kPad},
        dup{shared.dh[0] + kTileColumns + own_column, 2 * kTileColumns + kPad},
        a{shared.a[0] + own_column, kTileColumns + kPad};
    strip_product<kRankFragments, false, false>(b_gate, dgate, StripOperand<E>{shared.u[0], 2 * kMaxRank + kPad}, 16,
                                                columns);
    strip_product<kRankFragments, false, false>(b_up, dup, StripOperand<E>{shared.u[0] + kMaxRank, 2 * kMaxRank + kPad},
                                                16, columns);
    strip_product<kRankFragments, false, false>(a_down, a, StripOperand<E>{shared.e[0], kMaxRank + kPad}, 16, columns);
    sync_block();
  }
  column += own_column;
  store_gradient(to.b_gate[slot], b_gate, to.beta[0], column, p.width, rank, rank, 1);
  store_gradient(to.b_up[slot], b_up, to.beta[1], column, p.width, rank, rank, 1);
  store_gradient(to.a_down[slot], a_down, to.beta[2], column, p.width, rank, 1, p.width);
}

template <class E, class W>
void gradients(const AdapterGradients& op) {
  const ChainPlan p = chain_plan(op.plan, op.adapters, op.h0, op.gates, {});
  GradientTargets to{};
  const auto fill = [&](float*(&targets)[kMaxSlots], const std::vector<Tensor>& tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) targets[i] = tensors[i].defined() ? tensors[i].data<float>() : nullptr;
  };
  fill(to.b_gate, op.gradients.b_gate), fill(to.b_up, op.gradients.b_up), fill(to.a_down, op.gradients.a_down);
  for (size_t i = 0; i < 3; ++i) to.beta[i] = static_cast<float>(op.beta[i]);
  launch<adapter_gradients_kernel<E, W>>({.blocks = {static_cast<uint32_t>(ceil_div(p.width, kTileColumns)),
                                                     static_cast<uint32_t>(op.plan.slot_order.size())},
                                          .threads = {kTileThreads},
                                          .shared_bytes = sizeof(GradientShared<E>)},
                                         p, to, op.h0.data<E>(), op.u.data<E>(), op.ds.data<E>(), op.e.data<E>());
}

void gradients_device(const AdapterGradients& op) {
  visit_device_floating("adapter_gradients", op.h0.dtype(), [&]<class E>() {
    visit_device_floating("adapter_gradients", type_of(op.adapters), [&]<class W>() { gradients<E, W>(op); });
  });
}
const RegisterKernel<AdapterGradients> register_gradients{kDevice, &gradients_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
