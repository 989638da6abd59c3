#pragma once
// Sums and maxima over a warp or a block, in one fixed order: the same bits in every run. Every thread gets the result.
// Blocks have one dimension and a multiple of 32 threads, all of which must call.

#include "kernels/device/simt.h"

namespace lightmoe::LIGHTMOE_DEVICE {

template <class T>
DEVICE_FN T warp_sum(T value SITE) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance, 32, kFullWarp HERE);
  return value;
}

template <class T>
DEVICE_FN T warp_max(T value SITE) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const T other = shuffle_xor(value, distance, 32, kFullWarp HERE);
    value = value < other ? other : value;
  }
  return value;
}

// A member of the kernel's shared memory; one may serve several reductions after each other.
template <class T = float>
struct BlockScratch {
  T warps[32];
};

namespace detail {
template <class T, class Combine>
DEVICE_FN T block_reduce(T value, T neutral, BlockScratch<T>& scratch, Combine&& combine SITE) {
  value = combine(value);
  sync_block(HERE_ONLY);  // an earlier reduction may still read the scratch
  if (lane_id() == 0) scratch.warps[warp_id()] = value;
  sync_block(HERE_ONLY);
  return combine(lane_id() < static_cast<int>(blockDim.x / 32) ? scratch.warps[lane_id()] : neutral);
}
}  // namespace detail

template <class T>
DEVICE_FN T block_sum(T value, BlockScratch<T>& scratch SITE) {
  return detail::block_reduce(value, T(0), scratch, [&](T v) { return warp_sum(v HERE); } HERE);
}
// lowest: what an empty set has, for example -INFINITY.
template <class T>
DEVICE_FN T block_max(T value, T lowest, BlockScratch<T>& scratch SITE) {
  return detail::block_reduce(value, lowest, scratch, [&](T v) { return warp_max(v HERE); } HERE);
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
