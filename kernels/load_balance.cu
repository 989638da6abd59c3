#include "kernels/device/reduce.h"
#include "kernels/device/rows.h"
#include "kernels/router.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 1024;  // tokens of one block
constexpr int kLayers = 64;  // of one launch: their list is a kernel argument

struct LayerList {
  const float* probs[kLayers];
  const int* slots[kLayers];
  float* dprobs[kLayers];
  int top_k[kLayers];
};

DEVICE_FN bool is_counted(const uint8_t* mask, int t) { return mask == nullptr || mask[t] != 0; }

// chosen[e] += how often slot e was chosen, chosen[count] += counted tokens. Integers: the order of the atomics does not show.
__global__ void __launch_bounds__(kThreads) count_slots_kernel(const LayerList layers, const uint8_t* mask, int* chosen,
                                                               int rows, int count, bool count_tokens) {
  int* here = &shared_memory<int>();
  for (int e = static_cast<int>(threadIdx.x); e <= count; e += kThreads) here[e] = 0;
  sync_block();
  const int* slots = layers.slots[blockIdx.y];
  const int top_k = layers.top_k[blockIdx.y];
  const int begin = static_cast<int>(blockIdx.x) * kRows, end = std::min(begin + kRows, rows);
  for (int t = begin + static_cast<int>(threadIdx.x); t < end; t += kThreads) {
    if (!is_counted(mask, t)) continue;
    for (int k = 0; k < top_k; ++k) atomic_add(&here[slots[static_cast<int64_t>(t) * top_k + k]], 1);
    if (count_tokens && blockIdx.y == 0) atomic_add(&here[count], 1);
  }
  sync_block();
  for (int e = static_cast<int>(threadIdx.x); e <= count; e += kThreads) {
    if (here[e] != 0) atomic_add(&chosen[e], here[e]);
  }
}

struct ColumnSums {
  double warp[kWarps][32];
};

// partial[layer, chunk, e] = sum of p over the chunk's counted tokens. Lanes own experts, warps every eighth token.
__global__ void __launch_bounds__(kThreads)
    sum_probs_kernel(const LayerList layers, const uint8_t* mask, double* partial, int rows, int count) {
  auto& shared = shared_memory<ColumnSums>();
  const float* probs = layers.probs[blockIdx.y];
  const int begin = static_cast<int>(blockIdx.x) * kRows, end = std::min(begin + kRows, rows);
  double* out = partial + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * count;
  for (int first = 0; first < count; first += 32) {
    const int e = first + lane_id();
    double sum = 0;
    for (int t = begin + warp_id(); t < end; t += kWarps) {
      if (e < count && is_counted(mask, t)) sum += static_cast<double>(probs[static_cast<int64_t>(t) * count + e]);
    }
    shared.warp[warp_id()][lane_id()] = sum;
    sync_block();
    if (warp_id() == 0 && e < count) {
      for (int w = 1; w < kWarps; ++w) sum += shared.warp[w][lane_id()];
      out[e] = sum;
    }
    sync_block();
  }
}

// loss = E sum_e f_e P_e; one block. 0 where no token counts.
__global__ void __launch_bounds__(kThreads)
    loss_kernel(const double* partial, const int* chosen, double* loss, int64_t parts, int count, int layers) {
  auto& scratch = shared_memory<BlockScratch<double>>();
  const double tokens = static_cast<double>(chosen[count]) * layers;
  double total = 0;
  for (int e = static_cast<int>(threadIdx.x); e < count && tokens > 0; e += kThreads) {
    double sum = 0;
    for (int64_t p = 0; p < parts; ++p) sum += partial[p * count + e];
    total += static_cast<double>(chosen[e]) / tokens * (sum / tokens);
  }
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) *loss = static_cast<double>(count) * total;
}

// dprobs[layer][t,e] = scale E f_e / N for counted tokens, 0 for others.
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const LayerList layers, const uint8_t* mask, const int* chosen, int total, int count,
                    int num_layers, double scale) {
  constexpr int kV = kVector<float>;
  float* out = layers.dprobs[blockIdx.y];
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * kV;
  if (out == nullptr || i >= total) return;
  const double tokens = static_cast<double>(chosen[count]) * num_layers;
  Floats<kV> gradient{};
#pragma unroll
  for (int k = 0; k < kV; ++k) {
    if (i + k >= total || !is_counted(mask, (i + k) / count)) continue;
    gradient[k] = static_cast<float>(scale * count * (static_cast<double>(chosen[(i + k) % count]) / tokens) / tokens);
  }
  store_floats(out, i, total, reinterpret_cast<uintptr_t>(out) % 16 == 0, gradient);
}

// f(list, first layer, layers) for at most kLayers layers at a time. dprobs of an empty vector are null.
template <class F>
void for_each_list(const std::vector<Tensor>& probs, const std::vector<Tensor>& slots,
                   const std::vector<Tensor>& dprobs, F&& f) {
  for (size_t first = 0; first < probs.size(); first += kLayers) {
    const size_t layers = std::min<size_t>(kLayers, probs.size() - first);
    LayerList list{};
    for (size_t i = 0; i < layers; ++i) {
      list.probs[i] = probs[first + i].data<float>();
      list.slots[i] = slots[first + i].data<int32_t>();
      list.top_k[i] = static_cast<int>(slots[first + i].dim(1));
      if (!dprobs.empty() && dprobs[first + i].defined()) list.dprobs[i] = dprobs[first + i].data<float>();
    }
    f(list, static_cast<int>(first), static_cast<uint32_t>(layers));
  }
}

struct Sizes {
  int rows, count, layers;
  uint32_t chunks;
  const uint8_t* mask;
};
template <class Op>
Sizes sizes_of(const Op& op, const char* name) {
  if (op.probs[0].dtype() != DType::kF32) unsupported_dtype(name, op.probs[0].dtype());
  // NOTE: no Shape in a message here: fmt's formatting of one is constexpr, and nvcc takes its long double for device code.
  require(op.probs[0].numel() < int64_t{1} << 31, "{}: {} probs in one call", name, op.probs[0].numel());
  const int rows = static_cast<int>(op.probs[0].dim(0));
  return {.rows = rows,
          .count = static_cast<int>(op.probs[0].dim(1)),
          .layers = static_cast<int>(op.probs.size()),
          .chunks = static_cast<uint32_t>(ceil_div(rows, kRows)),
          .mask = op.mask.defined() ? op.mask.template data<uint8_t>() : nullptr};
}

template <class Op>
Tensor count_slots(const Op& op, const Sizes& sizes) {
  const Tensor chosen = Tensor::zeros({sizes.count + 1}, DType::kI32, kDevice);
  for_each_list(op.probs, op.slots, {}, [&](const LayerList& list, int first, uint32_t layers) {
    launch<count_slots_kernel>({.blocks = {sizes.chunks, layers},
                                .threads = {kThreads},
                                .shared_bytes = static_cast<size_t>(sizes.count + 1) * sizeof(int)},
                               list, sizes.mask, chosen.data<int32_t>(), sizes.rows, sizes.count, first == 0);
  });
  return chosen;
}

void forward_device(const LoadBalance& op) {
  const Sizes sizes = sizes_of(op, "load_balance");
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor chosen = count_slots(op, sizes);
  const int64_t parts = int64_t{sizes.chunks} * sizes.layers;
  const Tensor partial = Tensor::empty({parts, sizes.count}, DType::kF64, kDevice);
  for_each_list(op.probs, op.slots, {}, [&](const LayerList& list, int first, uint32_t layers) {
    launch<sum_probs_kernel>(
        {.blocks = {sizes.chunks, layers}, .threads = {kThreads}, .shared_bytes = sizeof(ColumnSums)}, list, sizes.mask,
        partial.data<double>() + int64_t{first} * sizes.chunks * sizes.count, sizes.rows, sizes.count);
  });
  launch<loss_kernel>({.blocks = {1}, .threads = {kThreads}, .shared_bytes = sizeof(BlockScratch<double>)},
                      partial.data<double>(), chosen.data<int32_t>(), op.loss.data<double>(), parts, sizes.count,
                      sizes.layers);
}

void backward_device(const LoadBalanceBackward& op) {
  const Sizes sizes = sizes_of(op, "load_balance_backward");
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor chosen = count_slots(op, sizes);
  const int total = sizes.rows * sizes.count;
  for_each_list(op.probs, op.slots, op.dprobs, [&](const LayerList& list, int, uint32_t layers) {
    launch<gradient_kernel>(
        {.blocks = {uint32_t(ceil_div(total, kThreads * kVector<float>)), layers}, .threads = {kThreads}}, list,
        sizes.mask, chosen.data<int32_t>(), total, sizes.count, sizes.layers, op.scale);
  });
}

const RegisterKernel<LoadBalance> register_forward{kDevice, &forward_device};
const RegisterKernel<LoadBalanceBackward> register_backward{kDevice, &backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
