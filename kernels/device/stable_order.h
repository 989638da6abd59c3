#pragma once
// Rows grouped by an integer key without atomics on their places, so that the order within a group is the rows' own: a radix sort of
// 8 bits a pass (keys below 2^16, as token ids mostly are, take two). Moves about 20 bytes a key and pass.

#include "kernels/device/simt.h"
#include "runtime/tensor.h"

namespace lightmoe::LIGHTMOE_DEVICE {

// order i32 [n]: the indices 0..n-1 sorted by (keys[i], i); keys i32 [n], each in [0, num_keys), or -1: comes last, in no group.
Tensor stable_order(const Tensor& keys, int64_t num_keys);

#if defined(__CUDACC__)
Tensor stable_order_cub(const Tensor& keys, int64_t num_keys);  // the same by CUB
#endif

// begins i32 [num_keys + 1]: key k's indices are order[begins[k]] .. order[begins[k + 1] - 1].
Tensor group_begins(const Tensor& keys, const Tensor& order, int64_t num_keys);

}  // namespace lightmoe::LIGHTMOE_DEVICE
