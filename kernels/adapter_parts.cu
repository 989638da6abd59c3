#include "kernels/adapter_tiles.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 256;

// out[p, c] = scale sum over the parts of parts[., p, c] in their order, for the columns that the pair's slot has.
struct PartSums {
  const float* parts;
  const float* gates;  // null: no scale
  const int32_t *pair_index, *slot_offsets;
  int num_parts, stride, columns_of_rank, slots;
  int64_t num_pairs;
  int16_t rank[kMaxSlots];
};

template <class T>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const __grid_constant__ PartSums p, T* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, pair = at / p.stride;
  const int column = static_cast<int>(at % p.stride);
  if (pair >= p.slot_offsets[p.slots]) return;
  const int slot = first_at_least(p.slot_offsets, 0, p.slots + 1, static_cast<int>(pair) + 1) - 1;
  if (column >= p.columns_of_rank * p.rank[slot]) return;
  float sum = 0;
  for (int i = 0; i < p.num_parts; ++i) sum += p.parts[(i * p.num_pairs + pair) * p.stride + column];
  out[at] = from_float<T>(p.gates != nullptr ? p.gates[p.pair_index[pair]] * sum : sum);
}

// Whether the pair's group is left alone: the last one whose positions' pairs begin at or before it.
DEVICE_FN bool of_done_group(const ChainPlan& p, int64_t pair) {
  int low = 0, high = p.groups;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (p.slot_offsets[p.group_positions[middle]] <= pair) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return is_done(p, low - 1);
}

// dgates[pair_index[p]] = sum over the parts of parts[., p].
__global__ void __launch_bounds__(kThreads)
    add_gate_parts_kernel(const __grid_constant__ ChainPlan p, const float* parts, float* dgates, int num_parts) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= p.num_pairs || p.pair_index[pair] < 0 || of_done_group(p, pair)) return;
  float sum = 0;
  for (int i = 0; i < num_parts; ++i) sum += parts[i * p.num_pairs + pair];
  dgates[p.pair_index[pair]] = sum;
}

}  // namespace

void add_parts(const DispatchPlan& plan, const ChainPlan& chain, const Tensor& parts, const float* gates,
               const Tensor& out) {
  PartSums p{.parts = parts.data<float>(),
             .gates = gates,
             .pair_index = chain.pair_index,
             .slot_offsets = chain.slot_offsets,
             .num_parts = static_cast<int>(parts.dim(0)),
             .stride = static_cast<int>(parts.dim(2)),
             .columns_of_rank = static_cast<int>(parts.dim(2)) / std::max(1, chain.rank_stride),
             .slots = static_cast<int>(plan.slot_order.size()),
             .num_pairs = chain.num_pairs,
             .rank = {}};
  std::copy_n(chain.rank, p.slots, p.rank);
  const Launch config{.blocks = {static_cast<uint32_t>(ceil_div(out.numel(), kThreads))}, .threads = {kThreads}};
  visit_device_floating("add_parts", out.dtype(),
                        [&]<class T>() { launch<add_parts_kernel<T>>(config, p, out.data<T>()); });
}

void add_gate_parts(const ChainPlan& p, const Tensor& parts, const Tensor& dgates) {
  launch<add_gate_parts_kernel>(
      {.blocks = {static_cast<uint32_t>(ceil_div(p.num_pairs, kThreads))}, .threads = {kThreads}}, p,
      parts.data<float>(), dgates.data<float>(), static_cast<int>(parts.dim(0)));
}

DType type_of(const AdapterMatrices& adapters) {
  for (const Tensor& b : adapters.b_gate) {
    if (b.defined()) return b.dtype();
  }
  return DType::kF32;
}

// Parts fill the machine where tiles are few: each is a block's share of F.
int parts_of(ChainPlan& p, uint32_t tiles) {
  const int chunks = ceil_div(p.width, kTileColumns);
  const int wanted = std::clamp(multiprocessors() / std::max(1, static_cast<int>(tiles)), 1, std::max(1, chunks));
  p.chunks_of_part = std::max(1, ceil_div(chunks, wanted));
  return std::max(1, ceil_div(chunks, p.chunks_of_part));
}

ChainPlan chain_plan(const DispatchPlan& plan, const AdapterMatrices& adapters, const Tensor& h0, const Tensor& gates,
                     const std::vector<uint8_t>& done) {
  check_chain_sizes("adapter_chain", plan);
  ChainPlan p{.pair_visit = plan.pair_visit.data<int32_t>(),
              .pair_index = plan.pair_index.data<int32_t>(),
              .slot_offsets = plan.slot_offsets.data<int32_t>(),
              .group_offsets = plan.group_offsets.data<int32_t>(),
              .gates = gates.data<float>(),
              .groups = static_cast<int>(plan.group_positions.size()) - 1,
              .width = static_cast<int>(h0.dim(1) / 2),
              .rank_stride = 0,
              .chunks_of_part = ceil_div(static_cast<int>(h0.dim(1) / 2), kTileColumns),
              .pairs_together = h0.dim(1) % 4 == 0,
              .ranks_aligned = true,
              .width_aligned = h0.dim(1) % 16 == 0,
              .num_pairs = plan.num_pairs,
              .done = {},
              .group_positions = {},
              .rank = {},
              .b_gate = {},
              .b_up = {},
              .a_down = {}};
  std::copy(plan.group_positions.begin(), plan.group_positions.end(), p.group_positions);
  for (size_t g = 0; g < done.size(); ++g) p.done[g / 32] |= static_cast<uint32_t>(done[g]) << g % 32;
  for (size_t i = 0; i < plan.slot_order.size(); ++i) {
    const int rank = static_cast<int>(adapters.rank(i));
    p.rank[i] = static_cast<int16_t>(rank);
    if (rank == 0) continue;
    p.rank_stride = std::max(p.rank_stride, rank);
    p.b_gate[i] = adapters.b_gate[i].raw(), p.b_up[i] = adapters.b_up[i].raw(), p.a_down[i] = adapters.a_down[i].raw();
    const auto starts = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16; };
    p.ranks_aligned = p.ranks_aligned && rank % 8 == 0 && starts(p.b_gate[i]) == 0 && starts(p.b_up[i]) == 0;
    p.width_aligned = p.width_aligned && starts(p.a_down[i]) == 0;
  }
  return p;
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
