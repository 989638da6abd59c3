#include "kernels/merge_slots.h"

#include "kernels/device/simt.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 256;

// A thread has one token; its rows lie in one or two cache lines.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_slots_kernel(const int* slots, const T* gates, const int* lanes, int* merged, T* merged_gates, int* first,
                       int tokens, int top_k, int dropped) {
  const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (t >= tokens) return;
  const int64_t row = static_cast<int64_t>(t) * top_k;
  for (int k = 0; k < top_k; ++k) {
    const int slot = slots[row + k];
    if (slot == dropped) {
      first[row + k] = k, merged[row + k] = dropped, merged_gates[row + k] = T(0);
      continue;
    }
    const int lane = lanes[slot];
    int j = 0;
    while (j < k && merged[row + j] != lane) ++j;
    const T gate = gates[row + k];
    first[row + k] = j;
    merged[row + k] = j < k ? dropped : lane;
    merged_gates[row + k] = j < k ? T(0) : gate;
    if (j < k) merged_gates[row + j] += gate;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_slots_backward_kernel(const T* dmerged, const int* first, T* dgates, int64_t count, int top_k) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) dgates[i] = dmerged[i / top_k * top_k + first[i]];
}

template <class T>
void forward(const MergeSlots& op) {
  const int tokens = static_cast<int>(op.slots.dim(0)), top_k = static_cast<int>(op.slots.dim(1));
  launch<merge_slots_kernel<T>>({.blocks = {uint32_t(ceil_div(tokens, kThreads))}, .threads = {kThreads}},
                                op.slots.data<int32_t>(), op.gates.data<T>(), op.lane_of_slot.data<int32_t>(),
                                op.merged_slots.data<int32_t>(), op.merged_gates.data<T>(), op.first.data<int32_t>(),
                                tokens, top_k, static_cast<int>(op.lane_of_slot.dim(0)));
}
template <class T>
void backward(const MergeSlotsBackward& op) {
  const int64_t count = op.first.numel();
  launch<merge_slots_backward_kernel<T>>({.blocks = {uint32_t(ceil_div(count, kThreads))}, .threads = {kThreads}},
                                         op.dmerged.data<T>(), op.first.data<int32_t>(), op.dgates.data<T>(), count,
                                         static_cast<int>(op.first.dim(1)));
}

void forward_device(const MergeSlots& op) {
  op.gates.dtype() == DType::kF64 ? forward<double>(op) : forward<float>(op);
}
void backward_device(const MergeSlotsBackward& op) {
  op.dgates.dtype() == DType::kF64 ? backward<double>(op) : backward<float>(op);
}
const RegisterKernel<MergeSlots> register_forward{kDevice, &forward_device};
const RegisterKernel<MergeSlotsBackward> register_backward{kDevice, &backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
