// kernels/device/stable_order.h with CUB's radix sort, which takes as many bits as the keys have. Only nvcc compiles it.

#ifdef __CUDACC__

#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "kernels/device/stable_order.h"

namespace lightmoe::cuda {
namespace {

constexpr int kThreads = 256;

// CUB sorts what keys say: -1 becomes the largest.
__global__ void __launch_bounds__(kThreads)
    cub_keys_kernel(const int* keys, unsigned* sortable, int* rows, int n, int num_keys) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= n) return;
  sortable[i] = static_cast<unsigned>(keys[i] < 0 ? num_keys : keys[i]);
  rows[i] = i;
}

}  // namespace

Tensor stable_order_cub(const Tensor& keys, int64_t num_keys) {
  const int n = static_cast<int>(keys.numel());
  const auto ints = [&] { return Tensor::empty({n}, DType::kI32, kDevice); };
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor order = ints(), rows = ints(), before = ints(), after = ints();
  if (n == 0) return order;
  const auto data = [](const Tensor& t) { return reinterpret_cast<unsigned*>(t.data<int32_t>()); };
  launch<cub_keys_kernel>({.blocks = {static_cast<uint32_t>(ceil_div(n, kThreads))}, .threads = {kThreads}},
                          keys.data<int32_t>(), data(before), rows.data<int32_t>(), n, static_cast<int>(num_keys));
  const int bits = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(num_keys, 1)));
  const auto stream = static_cast<cudaStream_t>(compute_stream(kDevice));
  size_t bytes = 0;
  Tensor memory;
  for (int round = 0; round < 2; ++round) {  // the first asks how much memory it takes
    check_cuda(cub::DeviceRadixSort::SortPairs(round == 0 ? nullptr : memory.raw(), bytes, data(before), data(after),
                                               rows.data<int32_t>(), order.data<int32_t>(), n, 0, bits, stream),
               "cub::DeviceRadixSort::SortPairs");
    if (round == 0) memory = Tensor::empty({static_cast<int64_t>(std::max<size_t>(bytes, 1))}, DType::kU8, kDevice);
  }
  return order;
}

}  // namespace lightmoe::cuda

#endif
