// As simt_fault_test.cu, for mbarriers, bulk copies, TMA and wgmma.
#if !defined(__CUDACC__)

#include "kernels/device/ptx_hopper.h"
#include "kernels/device/simulator/layouts.h"
#include "tests/support/fault_test.h"

namespace lightmoe::sim {
namespace {

using testing::expect_fault;
using testing::expect_race;

struct Stage {
  alignas(1024) float data[256];
  uint64_t full, free;
};
constexpr Launch kTwoWarps{.blocks = {1}, .threads = {64}, .shared_bytes = sizeof(Stage)};

int thread_id() { return static_cast<int>(threadIdx.x); }

__global__ void no_init_kernel() { ptx::mbarrier_arrive(&shared_memory<Stage>().full); }
__global__ void init_twice_kernel() {
  auto& s = shared_memory<Stage>();
  if (thread_id() == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::mbarrier_init(&s.full, 1);
  }
}
__global__ void too_many_arrivals_kernel() {
  auto& s = shared_memory<Stage>();
  if (thread_id() == 0) ptx::mbarrier_init(&s.full, 40);
  sync_block();
  if (thread_id() < 39) ptx::mbarrier_arrive(&s.full);
  sync_block();
  if (thread_id() == 0) {
    ptx::mbarrier_arrive_expect_bytes(&s.full, 16);  // the last arrival; bytes are still missing
    ptx::mbarrier_arrive(&s.full);
  }
}
__global__ void wrong_parity_kernel() {
  auto& s = shared_memory<Stage>();
  if (thread_id() == 0) ptx::mbarrier_init(&s.full, 64);
  sync_block();
  ptx::mbarrier_arrive(&s.full);
  ptx::mbarrier_wait(&s.full, 1);  // passes: the phase before the first counts as complete
  ptx::mbarrier_wait(&s.full, 0);
  ptx::mbarrier_wait(&s.full, 1);
}
TEST(SimFault, MisusedMbarriers) {
  expect_fault("mbarrier: mbarrier.arrive on a barrier that has not been", "no_init_kernel",
               [] { launch<no_init_kernel>(kTwoWarps); });
  expect_fault("mbarrier: mbarrier.init on a live barrier", "init_twice_kernel",
               [] { launch<init_twice_kernel>(kTwoWarps); });
  expect_fault("mbarrier: more arrivals", "too_many_arrivals_kernel",
               [] { launch<too_many_arrivals_kernel>(kTwoWarps); });
  expect_fault("deadlock", "wrong_parity_kernel", [] { launch<wrong_parity_kernel>(kTwoWarps); });
}

__global__ void no_barrier_after_init_kernel() {
  auto& s = shared_memory<Stage>();
  if (thread_id() == 0) ptx::mbarrier_init(&s.full, 1);
  if (thread_id() == 63) ptx::mbarrier_arrive(&s.full);
}
TEST(SimFault, MbarrierUsedBeforeEveryoneCanSeeIt) {
  if (simulator::options().seed != 0) return;  // in another order it is a use before init
  expect_race("data race", "no_barrier_after_init_kernel", [] { launch<no_barrier_after_init_kernel>(kTwoWarps); });
}

enum BulkBug { kNone, kNoWait, kTooFewBytes, kTooManyBytes, kNobodyWaits, kSourceChanges, kMisaligned };
template <BulkBug kBug>
__global__ void bulk_kernel(float* in, float* out) {
  auto& s = shared_memory<Stage>();
  if (thread_id() == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_bytes(&s.full, kBug == kTooFewBytes ? 512 : kBug == kTooManyBytes ? 2048 : 1024);
    ptx::bulk_load(s.data, in + (kBug == kMisaligned ? 1 : 0), 1024, &s.full);
    if (kBug == kSourceChanges) in[5] = 7;
  }
  sync_block();
  if (kBug == kNobodyWaits) return;
  if (kBug != kNoWait) ptx::mbarrier_wait(&s.full, 0);
  out[thread_id()] = s.data[thread_id()];
  ptx::mbarrier_wait(&s.full, 0);
}
template <BulkBug kBug>
void run_bulk(const DeviceArray<float>& in, const DeviceArray<float>& out) {
  launch<bulk_kernel<kBug>>(kTwoWarps, in.data(), out.data());
}
TEST(SimFault, BulkCopies) {
  const DeviceArray<float> in(std::vector<float>(260, 3.0f)), out(64);
  EXPECT_NO_THROW(run_bulk<kNone>(in, out));
  EXPECT_EQ(out.values(), std::vector<float>(64, 3.0f));
  expect_fault("deadlock", "bulk_kernel", [&] { run_bulk<kTooManyBytes>(in, out); });
  expect_fault("alignment", "bulk_kernel", [&] { run_bulk<kMisaligned>(in, out); });
  if (simulator::options().seed != 0) return;  // these need the copy to land late, which a seed leaves to chance
  expect_fault("deadlock", "bulk_kernel", [&] { run_bulk<kTooFewBytes>(in, out); });
  EXPECT_THROW(run_bulk<kNobodyWaits>(in, out), Error);  // the block ends with a copy in flight
  expect_fault("async race: bulk copy: the source changed", "bulk_kernel", [&] { run_bulk<kSourceChanges>(in, out); });
  expect_race("async race: read of a copy that was not waited for", "bulk_kernel", [&] { run_bulk<kNoWait>(in, out); });
}

__global__ void tma_kernel(const __grid_constant__ TensorMap map) {
  auto& s = shared_memory<Stage>();
  if (thread_id() == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::mbarrier_arrive_expect_bytes(&s.full, 512);
    ptx::tma_load_2d(s.data + 128, map, 0, 0, &s.full);  // 512 bytes into a tile that must start at 1024
  }
  sync_block();
  ptx::mbarrier_wait(&s.full, 0);
}
TEST(SimFault, Tma) {
  const DeviceArray<bf16> matrix(64 * 8);
  MatrixBox box{.base = matrix.data(), .rows = 8, .columns = 64, .row_bytes = 128, .box_rows = 4, .box_columns = 64};
  const TensorMap map = make_tensor_map(box);
  expect_fault("alignment", "tma_kernel", [&] { launch<tma_kernel>(kTwoWarps, map); });
  expect_fault("TMA: not a tensor map", "tma_kernel", [&] { launch<tma_kernel>(kTwoWarps, TensorMap{}); });
  box.row_bytes = 130;
  EXPECT_THROW(make_tensor_map(box), Error);
  box.row_bytes = 128, box.box_columns = 48;
  EXPECT_THROW(make_tensor_map(box), Error);
}

struct Operands {
  alignas(1024) bf16 a[64 * 64];
  alignas(1024) bf16 b[64 * 64];
};
enum WgmmaBug {
  kCorrect,
  kNoFence,
  kNoProxyFence,
  kNoWgmmaWait,
  kNoCommit,
  kOverwrite,
  kOneWarpLess,
  kFarDescriptor,
  kReadEarly
};
template <WgmmaBug kBug>
__global__ void wgmma_kernel(float* out) {
  auto& s = shared_memory<Operands>();
  for (int i = thread_id(); i < 64 * 64; i += 128) s.a[i] = s.b[i] = bf16(1.0f);
  if (kBug != kNoProxyFence) ptx::fence_proxy_async();
  sync_block();
  float d[32];
  for (float& v : d) v = 0;
  if (kBug == kOneWarpLess && thread_id() >= 96) return;
  if (kBug != kNoFence) ptx::wgmma_fence();
  const uint64_t a = ptx::wgmma_descriptor_k_major(s.a), b = ptx::wgmma_descriptor_k_major(s.b);
  ptx::wgmma_m64n64k16_bf16(d, a + (kBug == kFarDescriptor ? 1024 : 0), b, 1);
  if (kBug != kNoCommit) ptx::wgmma_commit();
  if (kBug == kOverwrite) s.b[thread_id()] = bf16(2.0f);
  if (kBug == kReadEarly) out[thread_id()] = d[0];
  if (kBug != kNoWgmmaWait) ptx::wgmma_wait<0>();
  if (kBug != kReadEarly) out[thread_id()] = d[0];
}
template <WgmmaBug kBug>
void run_wgmma(const DeviceArray<float>& out) {
  launch<wgmma_kernel<kBug>>({.blocks = {1}, .threads = {128}, .shared_bytes = sizeof(Operands)}, out.data());
}
TEST(SimFault, Wgmma) {
  const DeviceArray<float> out(128);
  EXPECT_NO_THROW(run_wgmma<kCorrect>(out));
  EXPECT_EQ(out.values(), std::vector<float>(128, 16.0f));
  expect_fault("wgmma: no wgmma.fence", "wgmma_kernel", [&] { run_wgmma<kNoFence>(out); });
  expect_race("missing fence_proxy_async", "wgmma_kernel", [&] { run_wgmma<kNoProxyFence>(out); });
  expect_fault("async: the warp ends with a wgmma that was never waited", "wgmma_kernel",
               [&] { run_wgmma<kNoWgmmaWait>(out); });
  expect_fault("async: the warp ends with a wgmma that was never committed", "wgmma_kernel",
               [&] { run_wgmma<kNoCommit>(out); });
  expect_fault("async race", "wgmma_kernel", [&] { run_wgmma<kOverwrite>(out); });
  expect_race("async race: write to an operand that wgmma still reads", "wgmma_kernel",
              [&] { run_wgmma<kOverwrite>(out); });
  EXPECT_THROW(run_wgmma<kOneWarpLess>(out), Error);
  expect_fault("shared out of bounds", "wgmma_kernel", [&] { run_wgmma<kFarDescriptor>(out); });
  EXPECT_NO_THROW(run_wgmma<kReadEarly>(out));
  for (const float v : out.values()) EXPECT_TRUE(std::isnan(v));  // the registers belong to wgmma until the wait
}

__global__ void registers_kernel() {
  if (thread_id() < 512) {
    ptx::increase_registers<232>();
  } else {
    ptx::decrease_registers<40>();
  }
}
TEST(SimFault, RegisterBudget) {
  expect_fault("setmaxnreg", "registers_kernel", [] { launch<registers_kernel>({.blocks = {1}, .threads = {640}}); });
}

}  // namespace
}  // namespace lightmoe::sim

#endif
