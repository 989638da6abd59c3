// The simulator's checks must be seen to fail: a kernel with one bug for each class of fault, and the report that must come. What only a
// checking build sees is asserted there; silence of correct kernels is what every other test of kernels asserts.
#if !defined(__CUDACC__)

#include <cstring>

#include "kernels/device/ptx.h"
#include "kernels/device/simulator/fiber.h"
#include "kernels/device/vector.h"
#include "tests/support/fault_test.h"

namespace lightmoe::sim {
namespace {

using testing::expect_fault;
using testing::expect_fault_under_asan;
using testing::expect_race;

struct Words {
  int v[64];
};
constexpr Launch kWarp{.blocks = {1}, .threads = {32}, .shared_bytes = sizeof(Words)};
constexpr Launch kTwoWarps{.blocks = {1}, .threads = {64}, .shared_bytes = sizeof(Words)};

int thread_id() { return static_cast<int>(threadIdx.x); }

__global__ void missing_barrier_kernel(int* out) {
  auto& s = shared_memory<Words>();
  s.v[thread_id()] = thread_id();
  out[thread_id()] = s.v[63 - thread_id()];
}
TEST(SimFault, MissingBarrier) {
  const DeviceArray<int> out(64);
  expect_race("data race: read after write", "missing_barrier_kernel",
              [&] { launch<missing_barrier_kernel>(kTwoWarps, out.data()); });
}

__global__ void refill_kernel(int* out) {  // the second round overwrites what others may still read
  auto& s = shared_memory<Words>();
  for (int i = 0; i < 2; ++i) {
    s.v[thread_id()] = thread_id() + i;
    sync_block();
    out[thread_id() * 2 + i] = s.v[63 - thread_id()];
  }
}
TEST(SimFault, MissingBarrierBeforeARefill) {
  const DeviceArray<int> out(128);
  expect_race("data race: write after read", "refill_kernel", [&] { launch<refill_kernel>(kTwoWarps, out.data()); });
}

__global__ void shuffle_is_no_barrier_kernel(int* out) {
  auto& s = shared_memory<Words>();
  s.v[lane_id()] = lane_id();
  const int first = shuffle(lane_id(), 0);
  out[lane_id()] = s.v[31 - lane_id()] + first;
}
TEST(SimFault, ShufflesOrderNoMemory) {
  const DeviceArray<int> out(32);
  expect_race("data race", "shuffle_is_no_barrier_kernel",
              [&] { launch<shuffle_is_no_barrier_kernel>(kWarp, out.data()); });
}

__global__ void plain_count_kernel(int* out) { out[thread_id()] += 1; }
TEST(SimFault, BlocksUpdateWithoutAtomics) {
  const DeviceArray<int> out(32);
  expect_race("data race", "plain_count_kernel",
              [&] { launch<plain_count_kernel>({.blocks = {2}, .threads = {32}}, out.data()); });
}

__global__ void uninitialised_kernel(int* out) { out[lane_id()] = shared_memory<Words>().v[lane_id()]; }
TEST(SimFault, UninitialisedSharedMemory) {
  const DeviceArray<int> out(32);
  if (testing::kRaceBuild) {
    expect_race("uninitialised read", "uninitialised_kernel", [&] { launch<uninitialised_kernel>(kWarp, out.data()); });
  } else {
    launch<uninitialised_kernel>(kWarp, out.data());
    EXPECT_EQ(out.values(), std::vector<int>(32, -1));  // the poison: NaN as a float
  }
}

struct Halves {
  short v[64];
};
// The first half of every word is written, and the word read: the bytes of one access are not alike.
__global__ void half_written_kernel(int* out) {
  auto& s = shared_memory<Halves>();
  s.v[2 * lane_id()] = 1;
  int word;
  std::memcpy(&word, &s.v[2 * lane_id()], sizeof word);
  out[lane_id()] = word;
}
TEST(SimFault, HalfOfAWordIsUninitialised) {
  const DeviceArray<int> out(32);
  expect_race("uninitialised read", "half_written_kernel", [&] { launch<half_written_kernel>(kWarp, out.data()); });
}

__global__ void copy_kernel(const int* in, int* out) { out[thread_id()] = in[thread_id()]; }
TEST(SimFault, UninitialisedGlobalMemory) {
  const Tensor nobody_wrote = Tensor::empty({32}, DType::kI32, kDevice);
  const DeviceArray<int> out(32);
  expect_race("uninitialised read", "copy_kernel",
              [&] { launch<copy_kernel>(kWarp, nobody_wrote.data<int32_t>(), out.data()); });
}
TEST(SimFault, GlobalOutOfBounds) {
  const DeviceArray<int> in(60), out(64);
  expect_race("global out of bounds", "copy_kernel", [&] { launch<copy_kernel>(kTwoWarps, in.data(), out.data()); });
  expect_fault_under_asan("heap-buffer-overflow", [&] { launch<copy_kernel>(kTwoWarps, in.data(), out.data()); });
  expect_race("global out of bounds", "copy_kernel", [&] { launch<copy_kernel>(kTwoWarps, out.data(), in.data()); });
}

__global__ void shared_overflow_kernel(int* out, int index) {
  auto& s = shared_memory<Words>();
  s.v[thread_id() + index] = 1;
  out[thread_id()] = s.v[thread_id() + index];
}
TEST(SimFault, SharedOutOfBounds) {
  const DeviceArray<int> out(64);
  expect_race("shared out of bounds", "shared_overflow_kernel",
              [&] { launch<shared_overflow_kernel>(kTwoWarps, out.data(), 1); });
  expect_fault_under_asan("use-after-poison", [&] { launch<shared_overflow_kernel>(kTwoWarps, out.data(), 1); });
}
__global__ void large_shared_kernel(int* out) { out[0] = shared_memory<Words>().v[0]; }
TEST(SimFault, MoreSharedMemoryThanTheLaunchGives) {
  const DeviceArray<int> out(1);
  expect_fault("shared memory", "large_shared_kernel",
               [&] { launch<large_shared_kernel>({.blocks = {1}, .threads = {1}, .shared_bytes = 128}, out.data()); });
}

__global__ void divergent_shuffle_kernel(int* out) {
  if (lane_id() < 8) out[lane_id()] = shuffle(lane_id(), 0);
}
__global__ void inactive_lane_kernel(int* out) {
  if (lane_id() < 16) out[lane_id()] = shuffle(lane_id(), 20, 32, 0xffffu);
}
__global__ void two_places_kernel(int* out) {
  if ((lane_id() & 1) != 0) {
    out[lane_id()] = shuffle(lane_id(), 0);
  } else {
    out[lane_id()] = shuffle(lane_id(), 1);
  }
}
TEST(SimFault, WarpDivergence) {
  const DeviceArray<int> out(32);
  expect_fault("warp shuffle", "inactive_lane_kernel", [&] { launch<inactive_lane_kernel>(kWarp, out.data()); });
  expect_fault("warp divergence", "two_places_kernel", [&] { launch<two_places_kernel>(kWarp, out.data()); });
}

__global__ void waits_for_ever_kernel(int* out) {
  if (lane_id() < 8) out[lane_id()] = shuffle(lane_id(), 0);
  sync_block();
}
TEST(SimFault, FullMaskShuffleInABranch) {
  const DeviceArray<int> out(32);
  expect_fault("deadlock", "waits_for_ever_kernel", [&] { launch<waits_for_ever_kernel>(kWarp, out.data()); });
  // Lanes that have ended count as arrived, as on the hardware; they may not be read.
  EXPECT_NO_THROW(launch<divergent_shuffle_kernel>(kWarp, out.data()));
}

__global__ void some_warps_kernel() {
  if (thread_id() < 32) sync_block();
  sync_block();
}
__global__ void early_return_kernel() {
  if (thread_id() >= 32) return;
  sync_block();
}
__global__ void wrong_count_kernel() { ptx::barrier_sync(1, thread_id() < 32 ? 64 : 32); }
TEST(SimFault, DivergentBarriers) {
  expect_fault("divergent barrier", "some_warps_kernel", [] { launch<some_warps_kernel>(kTwoWarps); });
  expect_fault("divergent barrier", "early_return_kernel", [] { launch<early_return_kernel>(kTwoWarps); });
  expect_fault("barrier", "wrong_count_kernel", [] { launch<wrong_count_kernel>(kTwoWarps); });
}

__global__ void misaligned_kernel(const float* in, float* out) {
  store_16(out + thread_id() * 4, load_16(in + 1 + thread_id() * 4));
}
TEST(SimFault, MisalignedVectorAccess) {
  const DeviceArray<float> in(256), out(256);
  expect_fault("alignment", "misaligned_kernel", [&] { launch<misaligned_kernel>(kWarp, in.data(), out.data()); });
}

struct Rows {
  alignas(16) uint16_t row[32][12];
};
__global__ void ldmatrix_kernel(uint32_t* out) {
  auto& s = shared_memory<Rows>();
  for (int i = 0; i < 12; ++i) s.row[lane_id()][i] = 0;
  sync_warp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, s.row[lane_id()]);  // rows 24 bytes apart
  out[lane_id()] = r[0];
}
TEST(SimFault, MisalignedLdmatrixRow) {
  const DeviceArray<uint32_t> out(32);
  expect_fault("alignment", "ldmatrix_kernel", [&] {
    launch<ldmatrix_kernel>({.blocks = {1}, .threads = {32}, .shared_bytes = sizeof(Rows)}, out.data());
  });
}

__global__ void mma_in_branch_kernel(float* out) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (lane_id() < 16) ptx::mma_m16n8k16_bf16(d, a, b);
  out[lane_id()] = d[0];
}
TEST(SimFault, MmaInABranch) {
  const DeviceArray<float> out(32);
  expect_fault("warp divergence", "mma_in_branch_kernel", [&] { launch<mma_in_branch_kernel>(kWarp, out.data()); });
}

struct Copies {
  float v[2][64][4];
};
constexpr Launch kCopies{.blocks = {1}, .threads = {64}, .shared_bytes = sizeof(Copies)};
template <int kGroupsLeft, bool kBarrier, bool kCommit>
__global__ void cp_async_kernel(const float* in, float* out) {
  auto& s = shared_memory<Copies>();
  ptx::cp_async_16(s.v[0][thread_id()], in + thread_id() * 4);
  if constexpr (kCommit) ptx::cp_async_commit();
  ptx::cp_async_wait<kGroupsLeft>();
  if constexpr (kBarrier) sync_block();
  out[thread_id()] = s.v[0][kBarrier ? thread_id() : 63 - thread_id()][0];
  ptx::cp_async_wait<0>();
}
TEST(SimFault, CpAsync) {
  const DeviceArray<float> in(std::vector<float>(256, 2.0f)), out(64);
  EXPECT_NO_THROW((launch<cp_async_kernel<0, true, true>>(kCopies, in.data(), out.data())));
  EXPECT_EQ(out.values(), std::vector<float>(64, 2.0f));
  expect_fault("async: the thread ends", "cp_async_kernel", [&] {
    launch<cp_async_kernel<0, true, false>>(kCopies, in.data(), out.data());  // the group is never committed
  });
  expect_race("data race: read after write", "cp_async_kernel", [&] {
    launch<cp_async_kernel<0, false, true>>(kCopies, in.data(),
                                            out.data());  // waited for, but no barrier for the others
  });
  const auto one_too_high = [&] { launch<cp_async_kernel<1, true, true>>(kCopies, in.data(), out.data()); };
  if (testing::kRaceBuild) {
    expect_race("async race: read of a copy that was not waited for", "cp_async_kernel", one_too_high);
  } else {
    one_too_high();
    for (const float v : out.values()) EXPECT_TRUE(std::isnan(v));  // the poison
  }
}

__global__ void trap_kernel() { trap(); }
TEST(SimFault, TrapAndLaunchLimits) {
  expect_fault("trap", "trap_kernel", [] { launch<trap_kernel>(kWarp); });
  EXPECT_THROW(launch<trap_kernel>({.blocks = {1}, .threads = {1025}}), Error);
  EXPECT_THROW(launch<trap_kernel>({.blocks = {1, 65536}, .threads = {32}}), Error);
  EXPECT_THROW(launch<trap_kernel>({.blocks = {1}, .threads = {32}, .shared_bytes = 228 << 10}), Error);
}

// A report names the line of the launch, which is not that of the kernel, whether the launch or the kernel is at fault.
TEST(SimFault, ReportsNameTheLaunch) {
  const auto expect_place = [](int line, auto&& action) {
    try {
      action();
      ADD_FAILURE() << "no fault";
    } catch (const Error& error) {
      const std::string place = fmt::format("launched at simt_fault_test.cu:{}", line);
      EXPECT_NE(std::string(error.what()).find(place), std::string::npos) << error.what() << ", expected " << place;
    }
  };
  expect_place(__LINE__, [] { launch<trap_kernel>({.blocks = {1}, .threads = {32}}); });
  expect_place(__LINE__, [] { launch<trap_kernel>({.blocks = {1}, .threads = {1025}}); });
  expect_place(__LINE__, [] { launch<trap_kernel>({.blocks = {1, 65536}, .threads = {32}}); });
  expect_place(__LINE__, [] { launch<trap_kernel>({.blocks = {1}, .threads = {32}, .shared_bytes = 228 << 10}); });
}

__global__ void undefined_behaviour_kernel(int* out, int shift) { out[0] = 1 << shift; }
TEST(SimFault, UndefinedBehaviour) {
  const DeviceArray<int> out(1);
  expect_fault_under_asan("shift exponent 32",
                          [&] { launch<undefined_behaviour_kernel>({.blocks = {1}, .threads = {1}}, out.data(), 32); });
}

}  // namespace
}  // namespace lightmoe::sim

#endif
