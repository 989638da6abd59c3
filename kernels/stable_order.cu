#include "kernels/device/stable_order.h"

#include <bit>

#include "kernels/device/reduce.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kDigits = 256, kDigitBits = 8;
constexpr int kThreads = 256, kWarps = kThreads / 32;  // a thread for each digit
constexpr int kRounds = 16;                            // of a warp, 32 keys each
constexpr int kTile = kWarps * kRounds * 32;           // keys of one block
constexpr int kScanThreads = 1024;

DEVICE_FN int item_at(const int* from, int i) { return from != nullptr ? from[i] : i; }

// As sorted: num_keys for -1.
struct Keys {
  const int* values;
  int num_keys;
  DEVICE_FN int operator[](int i) const { return values[i] < 0 ? num_keys : values[i]; }
};

// What the threads before this one sum up to.
template <int kBlockWarps>
DEVICE_FN int sum_before(int value, BlockScratch<int>& scratch) {
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = shuffle_up(sum, distance);
    if (lane_id() >= distance) sum += below;
  }
  if (lane_id() == 31) scratch.warps[warp_id()] = sum;
  sync_block();
  for (int w = 0; w < kBlockWarps; ++w) sum += w < warp_id() ? scratch.warps[w] : 0;
  return sum - value;
}

// counts[digit, tile]. Integer sums: the order of the atomics does not show.
__global__ void __launch_bounds__(kThreads)
    count_kernel(Keys keys, const int* from, int* counts, int n, int shift, int tiles) {
  struct Shared {
    int count[kDigits];
  };
  auto& shared = shared_memory<Shared>();
  shared.count[threadIdx.x] = 0;
  sync_block();
  const int begin = static_cast<int>(blockIdx.x) * kTile, end = std::min(n, begin + kTile);
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    atomic_add(&shared.count[keys[item_at(from, i)] >> shift & (kDigits - 1)], 1);
  }
  sync_block();
  counts[static_cast<int>(threadIdx.x) * tiles + static_cast<int>(blockIdx.x)] = shared.count[threadIdx.x];
}

// Each entry becomes the sum of those before it; one block.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int* counts, int n) {
  auto& scratch = shared_memory<BlockScratch<int>>();
  const int each = ceil_div(n, kScanThreads);
  const int begin = std::min(n, static_cast<int>(threadIdx.x) * each), end = std::min(n, begin + each);
  int sum = 0;
  for (int i = begin; i < end; ++i) sum += counts[i];
  int before = sum_before<kScanThreads / 32>(sum, scratch);
  for (int i = begin; i < end; ++i) {
    const int count = counts[i];
    counts[i] = before;
    before += count;
  }
}

struct ScatterShared {
  int place[kWarps][kDigits];  // counts first, then where the warp's next key of this digit goes
  BlockScratch<int> scratch;
};

// Warps own consecutive keys and take them 32 at a time, so that a key's place follows from the keys before it.
// places: what scan_kernel made; null for a single tile, which finds them itself.
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(Keys keys, const int* from, const int* places, int* to, int n, int shift, int tiles) {
  auto& shared = shared_memory<ScatterShared>();
  int* place = shared.place[warp_id()];
  for (int d = lane_id(); d < kDigits; d += 32) place[d] = 0;
  sync_warp();
  const int begin = (static_cast<int>(blockIdx.x) * kWarps + warp_id()) * kRounds * 32;
  const unsigned below = (1u << lane_id()) - 1;
  int item[kRounds], digit[kRounds], rank[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int i = begin + r * 32 + lane_id();
    item[r] = i < n ? item_at(from, i) : 0;
    digit[r] = i < n ? keys[item[r]] >> shift & (kDigits - 1) : kDigits;
    const unsigned peers = match_any(digit[r]);
    const bool valid = digit[r] < kDigits;
    rank[r] = std::popcount(peers & below) + (valid ? place[digit[r]] : 0);
    sync_warp();
    if (valid && (peers & below) == 0) place[digit[r]] += std::popcount(peers);
    sync_warp();
  }
  sync_block();
  const int d = static_cast<int>(threadIdx.x);
  int total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared.place[w][d];
  int next =
      places != nullptr ? places[d * tiles + static_cast<int>(blockIdx.x)] : sum_before<kWarps>(total, shared.scratch);
  for (int w = 0; w < kWarps; ++w) {
    const int count = shared.place[w][d];
    shared.place[w][d] = next;
    next += count;
  }
  sync_block();
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (digit[r] < kDigits) to[place[digit[r]] + rank[r]] = item[r];
  }
}

__global__ void __launch_bounds__(256) begins_kernel(Keys keys, const int* order, int* begins, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i > n) return;
  const int key = i < n ? keys[order[i]] : keys.num_keys, previous = i > 0 ? keys[order[i - 1]] : -1;
  for (int k = previous + 1; k <= key; ++k) begins[k] = i;
}

}  // namespace

Tensor stable_order(const Tensor& keys_of_rows, int64_t num_keys) {
  const Keys keys{keys_of_rows.data<int32_t>(), static_cast<int>(num_keys)};
  const int n = static_cast<int>(keys_of_rows.numel()), tiles = ceil_div(n, kTile);
  const int bits = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(num_keys, 1)));
  const MemoryScope scope(MemoryCategory::kScratch);
  Tensor order = Tensor::empty({n}, DType::kI32, kDevice), other;
  Tensor counts = Tensor::empty({tiles > 1 ? kDigits * tiles : 0}, DType::kI32, kDevice);
  const int* from = nullptr;
  for (int shift = 0; shift < bits; shift += kDigitBits) {
    if (shift > 0) {
      if (!other.defined()) other = Tensor::empty({n}, DType::kI32, kDevice);
      std::swap(order, other);
    }
    int* places = tiles > 1 ? counts.data<int32_t>() : nullptr;
    if (tiles > 1) {
      launch<count_kernel>({.blocks = {uint32_t(tiles)}, .threads = {kThreads}, .shared_bytes = kDigits * sizeof(int)},
                           keys, from, places, n, shift, tiles);
      launch<scan_kernel>({.blocks = {1}, .threads = {kScanThreads}, .shared_bytes = sizeof(BlockScratch<int>)}, places,
                          kDigits * tiles);
    }
    launch<scatter_kernel>({.blocks = {uint32_t(tiles)}, .threads = {kThreads}, .shared_bytes = sizeof(ScatterShared)},
                           keys, from, places, order.data<int32_t>(), n, shift, tiles);
    from = order.data<int32_t>();
  }
  return order;
}

Tensor group_begins(const Tensor& keys_of_rows, const Tensor& order, int64_t num_keys) {
  const Keys keys{keys_of_rows.data<int32_t>(), static_cast<int>(num_keys)};
  const int n = static_cast<int>(keys_of_rows.numel());
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor begins = Tensor::empty({num_keys + 1}, DType::kI32, kDevice);
  launch<begins_kernel>({.blocks = {uint32_t(ceil_div(n + 1, 256))}, .threads = {256}}, keys, order.data<int32_t>(),
                        begins.data<int32_t>(), n);
  return begins;
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
