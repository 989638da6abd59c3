// Threads, warps, barriers and atomics of kernels/device/simt.h and the helpers above it, each against its definition.
#include "kernels/device/simt.h"

#include <numeric>
#include <set>

#include "kernels/device/ptx.h"
#include "kernels/device/reduce.h"
#include "kernels/device/vector.h"
#include "tests/support/kernel_test.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

struct Place {
  uint32_t thread[3], block[3], block_size[3], grid_size[3];
};

__global__ void places_kernel(Place* out) {
  const uint32_t threads = blockDim.x * blockDim.y * blockDim.z;
  const uint32_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  Place& p = out[block * threads + thread];
  p = {{threadIdx.x, threadIdx.y, threadIdx.z},
       {blockIdx.x, blockIdx.y, blockIdx.z},
       {blockDim.x, blockDim.y, blockDim.z},
       {gridDim.x, gridDim.y, gridDim.z}};
}

DEVICE_TEST(Simt, EveryThreadOfEveryBlockRunsOnce) {
  DeviceArray<Place> out(7 * 3 * 2 * 5 * 2 * 2);
  launch<places_kernel>({.blocks = {5, 2, 2}, .threads = {7, 3, 2}}, out.data());
  std::set<std::vector<uint32_t>> seen;
  for (const Place& p : out.values()) {
    EXPECT_EQ(p.block_size[0] * 100 + p.block_size[1] * 10 + p.block_size[2], 732u);
    EXPECT_EQ(p.grid_size[0] * 100 + p.grid_size[1] * 10 + p.grid_size[2], 522u);
    seen.insert({p.thread[0], p.thread[1], p.thread[2], p.block[0], p.block[1], p.block[2]});
  }
  EXPECT_EQ(seen.size(), 7u * 3 * 2 * 5 * 2 * 2);
}

__global__ void add_one_kernel(int* out) { out[threadIdx.x] += 1; }

DEVICE_TEST(Simt, AnEmptyGridLaunchesNothing) {
  DeviceArray<int> out(32);
  launch<add_one_kernel>({.blocks = {0}, .threads = {32}}, out.data());
  launch<add_one_kernel>({.blocks = {1, 0}, .threads = {32}}, out.data());
  EXPECT_EQ(out.values(), std::vector<int>(32, 0));
}

__global__ void shuffles_kernel(int* out) {
  const int lane = lane_id();
  int* o = out + lane * 10;
  o[0] = shuffle(lane, 5);
  o[1] = shuffle(lane, 3, 8);
  o[2] = shuffle_up(lane, 2);
  o[3] = shuffle_up(lane, 3, 8);
  o[4] = shuffle_down(lane, 4);
  o[5] = shuffle_down(lane, 3, 16);
  o[6] = shuffle_xor(lane, 7);
  o[7] = shuffle_xor(lane, 8, 8);  // leaves the segment of 8: own value
  o[8] = static_cast<int>(shuffle_xor(0.5 * lane, 1) * 2);
  if (lane < 16) {
    o[9] = shuffle_xor(lane, 1, 32, 0x0000ffffu);
  } else {
    o[9] = shuffle_xor(lane, 2, 32, 0xffff0000u);
  }
}

DEVICE_TEST(Simt, Shuffles) {
  DeviceArray<int> out(320);
  launch<shuffles_kernel>({.blocks = {1}, .threads = {32}}, out.data());
  const std::vector<int> v = out.values();
  for (int l = 0; l < 32; ++l) {
    const std::vector<int> expected = {5,
                                       (l & ~7) + 3,
                                       l < 2 ? l : l - 2,
                                       (l & 7) < 3 ? l : l - 3,
                                       l > 27 ? l : l + 4,
                                       (l & 15) > 12 ? l : l + 3,
                                       l ^ 7,
                                       (l & 8) != 0 ? l - 8 : l,
                                       l ^ 1,
                                       l < 16 ? l ^ 1 : l ^ 2};
    EXPECT_EQ(std::vector<int>(v.begin() + l * 10, v.begin() + l * 10 + 10), expected) << "lane " << l;
  }
}

__global__ void votes_kernel(unsigned* out) {
  const int lane = lane_id();
  unsigned* o = out + lane * 9;
  o[0] = ballot(lane % 3 == 0);
  o[1] = any(lane == 40);
  o[2] = any(lane == 31);
  o[3] = all(lane < 32);
  o[4] = all(lane < 31);
  o[5] = match_any(lane / 4);
  o[6] = static_cast<unsigned>(reduce_add(lane));
  o[7] = static_cast<unsigned>(reduce_max(-lane));
  o[8] = reduce_min(static_cast<unsigned>(lane + 7));
}

DEVICE_TEST(Simt, VotesAndIntegerReductions) {
  DeviceArray<unsigned> out(32 * 9);
  launch<votes_kernel>({.blocks = {1}, .threads = {32}}, out.data());
  unsigned thirds = 0;
  for (int l = 0; l < 32; l += 3) thirds |= 1u << l;
  const std::vector<unsigned> v = out.values();
  for (unsigned l = 0; l < 32; ++l) {
    const std::vector<unsigned> expected = {thirds, 0, 1, 1, 0, 0xfu << (l & ~3u), 496, 0, 7};
    EXPECT_EQ(std::vector<unsigned>(v.begin() + l * 9, v.begin() + l * 9 + 9), expected) << "lane " << l;
  }
}

struct Neighbours {
  int values[100];
};
__global__ void barrier_kernel(int* out) {
  auto& shared = shared_memory<Neighbours>();
  const int t = static_cast<int>(threadIdx.x);
  shared.values[t] = t * 3;
  sync_block();
  out[t * 4] = shared.values[99 - t];
  out[t * 4 + 1] = sync_block_count(t % 7 == 0);
  out[t * 4 + 2] = sync_block_and(t < 100);
  out[t * 4 + 3] = sync_block_or(t > 200);
}

DEVICE_TEST(Simt, BlockBarriersOfAnIncompleteWarp) {
  DeviceArray<int> out(400);
  launch<barrier_kernel>({.blocks = {1}, .threads = {100}, .shared_bytes = sizeof(Neighbours)}, out.data());
  const std::vector<int> v = out.values();
  for (int t = 0; t < 100; ++t) {
    const auto i = static_cast<size_t>(t * 4);
    EXPECT_EQ(std::vector<int>(v.begin() + t * 4, v.begin() + t * 4 + 4), (std::vector<int>{(99 - t) * 3, 15, 1, 0}))
        << i;
  }
}

__global__ void named_barrier_kernel(int* out) {  // two groups of threads: one hands over, one waits
  auto& shared = shared_memory<Neighbours>();
  const int t = static_cast<int>(threadIdx.x);
  if (t < 64) {
    shared.values[t] = t * 3;
    ptx::barrier_arrive(1, 128);
  } else {
    ptx::barrier_sync(1, 128);
    out[static_cast<int>(blockIdx.x) * 64 + t - 64] = shared.values[127 - t];
  }
}

DEVICE_TEST(Simt, NamedBarriersHandOver) {
  DeviceArray<int> out(192);
  launch<named_barrier_kernel>({.blocks = {3}, .threads = {128}, .shared_bytes = sizeof(Neighbours)}, out.data());
  const std::vector<int> v = out.values();
  for (int i = 0; i < 192; ++i) EXPECT_EQ(v[static_cast<size_t>(i)], (63 - i % 64) * 3);
}

struct Atomics {
  float sum;
  double precise;
  int largest, smallest, exchanged, swapped;
};
__global__ void atomics_kernel(Atomics* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomic_add(&out->sum, 1.0f);
  atomic_add(&out->precise, 0.5);
  atomic_max(&out->largest, i);
  atomic_min(&out->smallest, -i);
  atomic_exchange(&out->exchanged, 5);
  atomic_cas(&out->swapped, i, i + 1);  // only the chain 0 -> 1 -> 2 ... in order can advance
}

DEVICE_TEST(Simt, AtomicsBetweenBlocks) {
  DeviceArray<Atomics> out(1);
  launch<atomics_kernel>({.blocks = {20}, .threads = {64}}, out.data());
  const Atomics a = out.values()[0];
  EXPECT_EQ(a.sum, 1280.0f);
  EXPECT_EQ(a.precise, 640.0);
  EXPECT_EQ(a.largest, 1279);
  EXPECT_EQ(a.smallest, -1279);
  EXPECT_EQ(a.exchanged, 5);
  EXPECT_GE(a.swapped, 1);
}

__global__ void reductions_kernel(const float* in, float* out) {
  auto& scratch = shared_memory<BlockScratch<>>();
  const float v = in[threadIdx.x];
  float* o = out + threadIdx.x * 4;
  o[0] = warp_sum(v);
  o[1] = warp_max(v);
  o[2] = block_sum(v, scratch);
  o[3] = block_max(v, -INFINITY, scratch);
}

DEVICE_TEST(Simt, SumsAndMaximaReachEveryThread) {
  for (const int threads : {32, 96, 1024}) {
    std::vector<float> in(static_cast<size_t>(threads));
    for (int i = 0; i < threads; ++i) in[static_cast<size_t>(i)] = static_cast<float>((i * 37) % 101 - 50);
    const DeviceArray<float> input(in), out(in.size() * 4);
    launch<reductions_kernel>({.blocks = {1}, .threads = {uint32_t(threads)}, .shared_bytes = sizeof(BlockScratch<>)},
                              input.data(), out.data());
    const std::vector<float> v = out.values();
    for (size_t i = 0; i < in.size(); ++i) {
      const auto begin = in.begin() + static_cast<std::ptrdiff_t>(i / 32 * 32);
      EXPECT_EQ(v[i * 4], std::accumulate(begin, begin + 32, 0.0f));
      EXPECT_EQ(v[i * 4 + 1], *std::max_element(begin, begin + 32));
      EXPECT_EQ(v[i * 4 + 2], std::accumulate(in.begin(), in.end(), 0.0f));
      EXPECT_EQ(v[i * 4 + 3], *std::max_element(in.begin(), in.end()));
    }
  }
}

template <class T>
__global__ void copy_rows_kernel(const T* in, T* out, int n, bool aligned) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n;
  for (int i = static_cast<int>(threadIdx.x) * kVector<T>; i < n; i += static_cast<int>(blockDim.x) * kVector<T>) {
    store_floats(out + row, i, n, aligned, load_floats<kVector<T>>(in + row, i, n, aligned));
  }
}

template <class T>
void check_copy(int width) {
  std::vector<T> values;
  for (int i = 0; i < 3 * width; ++i) values.push_back(T(static_cast<float>(i % 251) - 7.5f));
  const DeviceArray<T> in(values), out(values.size());
  launch<copy_rows_kernel<T>>({.blocks = {3}, .threads = {32}}, in.data(), out.data(), width,
                              aligned_rows(width, in.data(), out.data()));
  const std::vector<T> copied = out.values();
  EXPECT_EQ(std::memcmp(copied.data(), values.data(), values.size() * sizeof(T)), 0) << "width " << width;
}

DEVICE_TEST(Simt, RowsOfAnyWidthAreCopiedExactly) {
  for (const int width : {1, 3, 4, 8, 31, 64, 100, 256, 257}) {
    check_copy<float>(width);
    check_copy<bf16>(width);
  }
}

__global__ void round_kernel(const float* in, bf16* out, uint32_t* pairs, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  out[i] = from_float<bf16>(in[i]);
  pairs[i] = pack_bf16(in[i], in[n - 1 - i]);
}

DEVICE_TEST(Simt, RoundingToBf16IsTheHosts) {
  std::vector<float> in = {0.0f, -0.0f, 1.0f, 1.00390625f, 1.01171875f, 3.4e38f, -3.4e38f, 1e-40f, INFINITY, -INFINITY};
  for (uint32_t i = 0; i < 1000; ++i) in.push_back(std::bit_cast<float>(i * 4123457u % 0x7f000000u));
  const int n = static_cast<int>(in.size());
  const DeviceArray<float> input(in);
  const DeviceArray<bf16> out(in.size());
  const DeviceArray<uint32_t> pairs(in.size());
  launch<round_kernel>({.blocks = {uint32_t(ceil_div(n, 128))}, .threads = {128}}, input.data(), out.data(),
                       pairs.data(), n);
  const std::vector<bf16> rounded = out.values();
  const std::vector<uint32_t> packed = pairs.values();
  for (size_t i = 0; i < in.size(); ++i) {
    EXPECT_EQ(rounded[i].bits, bf16(in[i]).bits) << in[i];
    EXPECT_EQ(packed[i], bf16(in[i]).bits | static_cast<uint32_t>(bf16(in[in.size() - 1 - i]).bits) << 16);
  }
}

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
