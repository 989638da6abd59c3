// Every wrapper of kernels/device/ptx_hopper.h and ptx_wgmma.h against the definition of its instruction.
#include "kernels/device/ptx_hopper.h"

#include "kernels/device/numeric.h"
#include "kernels/device/simulator/layouts.h"
#include "tests/support/kernel_test.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

namespace layout = simulator::layout;

std::vector<bf16> small_integers(size_t count, uint32_t seed) {  // products and sums of these are exact in f32
  std::vector<bf16> out(count);
  for (bf16& v : out) {
    seed = seed * 1664525u + 1013904223u;
    v = bf16(static_cast<float>(static_cast<int>(seed >> 28) - 8));
  }
  return out;
}

struct Handover {
  uint64_t full, free;
  int value;
};
__global__ void mbarrier_kernel(int* out) {  // thread 0 produces, the second warp consumes, four phases
#ifdef LIGHTMOE_HOPPER_CODE
  auto& shared = shared_memory<Handover>();
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    ptx::mbarrier_init(&shared.full, 1);
    ptx::mbarrier_init(&shared.free, 32);
    ptx::fence_mbarrier_init();
  }
  sync_block();
  for (int i = 0; i < 4; ++i) {
    const uint32_t phase = static_cast<uint32_t>(i & 1);
    if (t == 0) {
      ptx::mbarrier_wait(&shared.free, phase ^ 1);  // passes at once in the first round
      shared.value = i * 10;
      ptx::mbarrier_arrive(&shared.full);
    } else if (t >= 32) {
      ptx::mbarrier_wait(&shared.full, phase);
      out[static_cast<int>(blockIdx.x) * 128 + i * 32 + t - 32] = shared.value;
      ptx::mbarrier_arrive(&shared.free);
    }
  }
  sync_block();
  if (t == 0) {
    ptx::mbarrier_invalidate(&shared.full);
    ptx::mbarrier_init(&shared.full, 1);  // an invalidated barrier may be made anew
  }
#endif
}

DEVICE_TEST(PtxHopper, MbarriersHandOver) {
  const DeviceArray<int> out(256);
  launch<mbarrier_kernel>({.blocks = {2}, .threads = {64}, .shared_bytes = sizeof(Handover)}, out.data());
  const std::vector<int> v = out.values();
  for (int i = 0; i < 256; ++i) EXPECT_EQ(v[static_cast<size_t>(i)], i % 128 / 32 * 10);
}

struct Bulk {
  alignas(16) float data[256];
  uint64_t full;
};
__global__ void bulk_kernel(const float* in, float* out) {
#ifdef LIGHTMOE_HOPPER_CODE
  auto& shared = shared_memory<Bulk>();
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    ptx::mbarrier_init(&shared.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_bytes(&shared.full, 1024);
    ptx::bulk_load(shared.data, in, 512, &shared.full);
    ptx::bulk_load(shared.data + 128, in + 128, 512, &shared.full);
  }
  sync_block();
  while (!ptx::mbarrier_try_wait(&shared.full, 0)) {
  }
  for (int i = t; i < 256; i += 64) out[i] = shared.data[255 - i];
#endif
}

DEVICE_TEST(PtxHopper, BulkLoadsCountBytes) {
  std::vector<float> in(256);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  const DeviceArray<float> input(in), out(256);
  launch<bulk_kernel>({.blocks = {1}, .threads = {64}, .shared_bytes = sizeof(Bulk)}, input.data(), out.data());
  const std::vector<float> v = out.values();
  for (size_t i = 0; i < 256; ++i) EXPECT_EQ(v[i], in[255 - i]);
}

template <int kColumns>
struct Box {
  alignas(1024) bf16 data[8 * kColumns];
  uint64_t full;
};
template <int kColumns>
__global__ void tma_kernel(const __grid_constant__ TensorMap map, int column, int row, bf16* out) {
#ifdef LIGHTMOE_HOPPER_CODE
  auto& shared = shared_memory<Box<kColumns>>();
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(map);
    ptx::mbarrier_init(&shared.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_bytes(&shared.full, sizeof(shared.data));
    ptx::tma_load_2d(shared.data, map, column, row, &shared.full);
  }
  sync_block();
  ptx::mbarrier_wait(&shared.full, 0);
  constexpr auto kSwizzle = kColumns == 64   ? layout::Swizzle::k128
                            : kColumns == 32 ? layout::Swizzle::k64
                                             : layout::Swizzle::k32;
  for (int i = static_cast<int>(threadIdx.x); i < 8 * kColumns; i += 32) {
    const uint32_t base = ptx::shared_address(shared.data);
    out[i] = shared.data[(layout::swizzled(base + static_cast<uint32_t>(i) * 2, kSwizzle) - base) / 2];
  }
#endif
}

template <int kColumns>
void check_tma(int column, int row) {
  constexpr int kRows = 11, kWidth = 80;
  std::vector<bf16> in;
  for (int i = 0; i < kRows * kWidth; ++i) in.push_back(bf16(static_cast<float>(i % 256 + 1)));
  const DeviceArray<bf16> input(in), out(8 * kColumns);
  const TensorMap map = make_tensor_map({.base = input.data(),
                                         .rows = kRows,
                                         .columns = kWidth,
                                         .row_bytes = kWidth * 2,
                                         .box_rows = 8,
                                         .box_columns = kColumns});
  launch<tma_kernel<kColumns>>({.blocks = {1}, .threads = {32}, .shared_bytes = sizeof(Box<kColumns>)}, map, column,
                               row, out.data());
  const std::vector<bf16> v = out.values();
  for (int i = 0; i < 8 * kColumns; ++i) {
    const int r = row + i / kColumns, c = column + i % kColumns;
    const bool inside = r >= 0 && r < kRows && c >= 0 && c < kWidth;
    const float expected = inside ? static_cast<float>(in[static_cast<size_t>(r * kWidth + c)]) : 0.0f;
    EXPECT_EQ(static_cast<float>(v[static_cast<size_t>(i)]), expected) << kColumns << " columns, element " << i;
  }
}

DEVICE_TEST(PtxHopper, TmaBringsABoxAndZerosAroundTheMatrix) {
  for (const auto& [column, row] : {std::pair{0, 0}, {8, 2}, {48, 6}, {-8, -3}, {3, 9}, {200, 0}}) {
    check_tma<64>(column, row);
    check_tma<32>(column, row);
    check_tma<16>(column, row);
  }
}

template <int kN>
struct Operands {
  alignas(1024) bf16 a[64 * 64];
  alignas(1024) bf16 b[kN * 64];
};

template <int kN, int kBMnMajor, bool kARegisters, int kAMnMajor>
__global__ void wgmma_kernel(const bf16* a, const bf16* b, float* d) {  // a[64][64], b[kN][64]
#ifdef LIGHTMOE_HOPPER_CODE
  auto& shared = shared_memory<Operands<kN>>();
  const int t = static_cast<int>(threadIdx.x);
  const auto swizzled = [](int byte) {
    return layout::swizzled(static_cast<uint32_t>(byte), layout::Swizzle::k128) / 2;
  };
  for (int i = t; i < 64 * 64; i += 128) {
    shared.a[kAMnMajor == 0 ? swizzled(i * 2) : swizzled((i % 64 * 64 + i / 64) * 2)] = a[i];
  }
  for (int i = t; i < kN * 64; i += 128) {
    const int n = i / 64, k = i % 64;
    shared
        .b[kBMnMajor == 0 ? swizzled(i * 2) : static_cast<uint32_t>(n / 64 * 4096) + swizzled((k * 64 + n % 64) * 2)] =
        b[i];
  }
  ptx::fence_proxy_async();  // ordinary stores become visible to wgmma
  sync_block();
  float sum[kN / 2];
  for (float& v : sum) v = 3;
  const uint64_t da =
      kAMnMajor == 0 ? ptx::wgmma_descriptor_k_major(shared.a) : ptx::wgmma_descriptor_mn_major(shared.a, 8192);
  const uint64_t db =
      kBMnMajor == 0 ? ptx::wgmma_descriptor_k_major(shared.b) : ptx::wgmma_descriptor_mn_major(shared.b, 8192);
  uint32_t registers[4][4];
  for (int k = 0; k < 4; ++k) {
    for (int e = 0; e < 8; e += 2) {
      const auto p = layout::mma_a(t % 32, e);
      const bf16* pair = a + (t / 32 * 16 + p.row) * 64 + k * 16 + p.column;
      registers[k][e / 2] = pack_bf16(to_float(pair[0]), to_float(pair[1]));
    }
  }
  ptx::wgmma_fence_registers(sum);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t bk = db + static_cast<uint64_t>(k * (kBMnMajor == 0 ? 2 : 128));
    const int accumulate = k > 0;  // the first starts from zero, whatever the registers hold
    if constexpr (kARegisters) {
      if constexpr (kN == 32) ptx::wgmma_m64n32k16_bf16<kBMnMajor>(sum, registers[k], bk, accumulate);
      if constexpr (kN == 64) ptx::wgmma_m64n64k16_bf16<kBMnMajor>(sum, registers[k], bk, accumulate);
      if constexpr (kN == 128) ptx::wgmma_m64n128k16_bf16<kBMnMajor>(sum, registers[k], bk, accumulate);
      if constexpr (kN == 256) ptx::wgmma_m64n256k16_bf16<kBMnMajor>(sum, registers[k], bk, accumulate);
    } else {
      const uint64_t ak = da + static_cast<uint64_t>(k * (kAMnMajor == 0 ? 2 : 128));
      if constexpr (kN == 32) ptx::wgmma_m64n32k16_bf16<kBMnMajor, kAMnMajor>(sum, ak, bk, accumulate);
      if constexpr (kN == 64) ptx::wgmma_m64n64k16_bf16<kBMnMajor, kAMnMajor>(sum, ak, bk, accumulate);
      if constexpr (kN == 128) ptx::wgmma_m64n128k16_bf16<kBMnMajor, kAMnMajor>(sum, ak, bk, accumulate);
      if constexpr (kN == 256) ptx::wgmma_m64n256k16_bf16<kBMnMajor, kAMnMajor>(sum, ak, bk, accumulate);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_fence_registers(sum);
  for (int e = 0; e < kN / 2; ++e) {
    const auto p = layout::wgmma_d(t, e);
    d[p.row * kN + p.column] = sum[e];
  }
#endif
}

template <int kN, int kBMnMajor, bool kARegisters, int kAMnMajor = 0>
void check_wgmma() {
  const std::vector<bf16> a = small_integers(64 * 64, 3), b = small_integers(kN * 64, 4);
  const DeviceArray<bf16> da(a), db(b);
  const DeviceArray<float> d(64 * kN);
  launch<wgmma_kernel<kN, kBMnMajor, kARegisters, kAMnMajor>>(
      {.blocks = {1}, .threads = {128}, .shared_bytes = sizeof(Operands<kN>)}, da.data(), db.data(), d.data());
  const std::vector<float> v = d.values();
  int wrong = 0;
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < kN; ++n) {
      float expected = 0;
      for (int k = 0; k < 64; ++k) {
        expected += static_cast<float>(a[static_cast<size_t>(m * 64 + k)]) *
                    static_cast<float>(b[static_cast<size_t>(n * 64 + k)]);
      }
      wrong += v[static_cast<size_t>(m * kN + n)] != expected;
    }
  }
  EXPECT_EQ(wrong, 0) << "N " << kN << (kBMnMajor != 0 ? ", B MN-major" : "") << (kAMnMajor != 0 ? ", A MN-major" : "")
                      << (kARegisters ? ", A in registers" : "");
}

DEVICE_TEST(PtxHopper, WgmmaMultiplies) {
  check_wgmma<32, 0, false>();
  check_wgmma<64, 0, false>();
  check_wgmma<128, 0, false>();
  check_wgmma<256, 0, false>();
  check_wgmma<64, 1, false>();
  check_wgmma<128, 1, false>();
  check_wgmma<256, 1, false>();
  check_wgmma<64, 0, false, 1>();
  check_wgmma<128, 1, false, 1>();
  check_wgmma<256, 1, false, 1>();
}

DEVICE_TEST(PtxHopper, WgmmaTakesAFromRegisters) {
  check_wgmma<32, 0, true>();
  check_wgmma<64, 0, true>();
  check_wgmma<128, 1, true>();
  check_wgmma<256, 1, true>();
}

__global__ void __launch_bounds__(256) registers_kernel(int* elected) {
#ifdef LIGHTMOE_HOPPER_CODE
  if (threadIdx.x < 128) {
    ptx::decrease_registers<40>();
  } else {
    ptx::increase_registers<232>();
  }
  if (ptx::elect_one()) atomic_add(elected + threadIdx.x / 32, 1);
#endif
}

DEVICE_TEST(PtxHopper, OneLaneOfAWarpIsElected) {
  const DeviceArray<int> elected(8);
  launch<registers_kernel>({.blocks = {1}, .threads = {256}}, elected.data());
  EXPECT_EQ(elected.values(), std::vector<int>(8, 1));
}

// Core matrices of the PTX ISA ("strides" of wgmma operands): 8 rows of 16 bytes. Without a swizzle they are 128 contiguous bytes, with a
// 128-byte swizzle 8 of them stand side by side in 1024 bytes and piece p of row r is found at piece p xor r.
DEVICE_TEST(PtxHopper, OperandAddressesAreThoseOfTheirDefinition) {
  const auto descriptor = [](uint64_t start, uint64_t leading, uint64_t stride, uint64_t swizzle) {
    return layout::Descriptor(start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | swizzle << 62);
  };
  const layout::Descriptor plain = descriptor(2048, 512, 256, 0), swizzled = descriptor(4096, 16, 1024, 1);
  for (int mn = 0; mn < 32; ++mn) {
    for (int k = 0; k < 16; ++k) {
      const auto m = static_cast<uint32_t>(mn), kk = static_cast<uint32_t>(k);
      EXPECT_EQ(layout::operand_address(plain, mn, k, false),
                2048 + m / 8 * 256 + kk / 8 * 512 + m % 8 * 16 + kk % 8 * 2);
      EXPECT_EQ(layout::operand_address(plain, mn, k, true),
                2048 + m / 8 * 256 + kk / 8 * 512 + kk % 8 * 16 + m % 8 * 2);
      const uint32_t piece = (kk / 8) ^ (m % 8);
      EXPECT_EQ(layout::operand_address(swizzled, mn, k, false),
                4096 + m / 8 * 1024 + m % 8 * 128 + piece * 16 + kk % 8 * 2);
    }
  }
}

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
