#include "kernels/merge_slots.h"

#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kTokenGrain = 256;

template <class T>
void forward(const MergeSlots& op) {
  const int64_t tokens = op.slots.dim(0), top_k = op.slots.dim(1);
  const auto dropped = static_cast<int32_t>(op.lane_of_slot.dim(0));
  const int32_t *slots = op.slots.data<int32_t>(), *lanes = op.lane_of_slot.data<int32_t>();
  const T* gates = op.gates.data<T>();
  int32_t *merged = op.merged_slots.data<int32_t>(), *first = op.first.data<int32_t>();
  T* merged_gates = op.merged_gates.data<T>();
  parallel_for(0, tokens, kTokenGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * top_k; row < end * top_k; row += top_k) {
      for (int64_t k = 0; k < top_k; ++k) {
        const int32_t slot = slots[row + k];
        if (slot == dropped) {
          first[row + k] = static_cast<int32_t>(k), merged[row + k] = dropped, merged_gates[row + k] = 0;
          continue;
        }
        const int32_t lane = lanes[slot];
        int64_t j = 0;
        while (j < k && merged[row + j] != lane) ++j;
        first[row + k] = static_cast<int32_t>(j);
        merged[row + k] = j < k ? dropped : lane;
        merged_gates[row + k] = j < k ? T(0) : gates[row + k];
        if (j < k) merged_gates[row + j] += gates[row + k];
      }
    }
  });
}

template <class T>
void backward(const MergeSlotsBackward& op) {
  const int64_t tokens = op.first.dim(0), top_k = op.first.dim(1);
  const int32_t* first = op.first.data<int32_t>();
  const T* dmerged = op.dmerged.data<T>();
  T* dgates = op.dgates.data<T>();
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < top_k; ++k) dgates[t * top_k + k] = dmerged[t * top_k + first[t * top_k + k]];
  }
}

void forward_cpu(const MergeSlots& op) { op.gates.dtype() == DType::kF64 ? forward<double>(op) : forward<float>(op); }
void backward_cpu(const MergeSlotsBackward& op) {
  op.dgates.dtype() == DType::kF64 ? backward<double>(op) : backward<float>(op);
}
const RegisterKernel<MergeSlots> register_forward{DeviceKind::kCpu, &forward_cpu};
const RegisterKernel<MergeSlotsBackward> register_backward{DeviceKind::kCpu, &backward_cpu};

}  // namespace

void run(const MergeSlots& op) {
  require(op.slots.rank() == 2, "merge_slots: slots is {}, expected [T, K]", op.slots.shape());
  const Shape shape = op.slots.shape();
  require_tensor(op.slots, "merge_slots", "slots", shape, DType::kI32);
  require_tensor(op.lane_of_slot, "merge_slots", "lane_of_slot", {op.lane_of_slot.dim(0)}, DType::kI32);
  require_tensor(op.gates, "merge_slots", "gates", shape, op.gates.dtype() == DType::kF64 ? DType::kF64 : DType::kF32);
  require_tensor(op.merged_gates, "merge_slots", "merged_gates", shape, op.gates.dtype());
  require_tensor(op.merged_slots, "merge_slots", "merged_slots", shape, DType::kI32);
  require_tensor(op.first, "merge_slots", "first", shape, DType::kI32);
  dispatch(op, op.slots.device(), "merge_slots");
}

void run(const MergeSlotsBackward& op) {
  require(op.first.rank() == 2, "merge_slots_backward: first is {}, expected [T, K]", op.first.shape());
  const DType dtype = op.dgates.dtype() == DType::kF64 ? DType::kF64 : DType::kF32;
  require_tensor(op.dmerged, "merge_slots_backward", "dmerged", op.first.shape(), dtype);
  require_tensor(op.dgates, "merge_slots_backward", "dgates", op.first.shape(), dtype);
  dispatch(op, op.first.device(), "merge_slots_backward");
}

}  // namespace lightmoe
