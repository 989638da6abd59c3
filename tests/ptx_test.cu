// Every wrapper of kernels/device/ptx.h against the definition of its instruction, and the fragment maps against theirs.
#include "kernels/device/ptx.h"

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
float at(const std::vector<bf16>& m, int row, int column, int columns) {
  return static_cast<float>(m[static_cast<size_t>(row * columns + column)]);
}

struct Tile16 {
  bf16 a[16][24];  // rows 48 bytes apart: 16-byte aligned, no two of eight in one bank group
  bf16 b[8][24];
};

// D = A B^T with fragments gathered by hand from the maps: a[16][16], b[8][16] (n, k).
__global__ void mma_from_maps_kernel(const bf16* a, const bf16* b, float* d) {
  const int lane = lane_id();
  uint32_t fa[4], fb[2];
  float fd[4] = {1, 2, 3, 4};
  for (int e = 0; e < 8; e += 2) {
    const auto p = layout::mma_a(lane, e), q = layout::mma_a(lane, e + 1);
    fa[e / 2] = pack_bf16(to_float(a[p.row * 16 + p.column]), to_float(a[q.row * 16 + q.column]));
  }
  for (int e = 0; e < 4; e += 2) {
    const auto p = layout::mma_b(lane, e), q = layout::mma_b(lane, e + 1);
    fb[e / 2] = pack_bf16(to_float(b[p.column * 16 + p.row]), to_float(b[q.column * 16 + q.row]));
  }
  ptx::mma_m16n8k16_bf16(fd, fa, fb);
  for (int e = 0; e < 4; ++e) {
    const auto p = layout::mma_d(lane, e);
    d[p.row * 8 + p.column] = fd[e] - static_cast<float>(e + 1);
  }
}

// The same through shared memory, cp.async and ldmatrix, as a GEMM does it.
__global__ void mma_from_ldmatrix_kernel(const bf16* a, const bf16* b, float* d) {
  auto& tile = shared_memory<Tile16>();
  const int lane = lane_id();
  ptx::cp_async_16(&tile.a[lane / 2][lane % 2 * 8], a + lane * 8);
  if (lane < 16) ptx::cp_async_16(&tile.b[lane / 2][lane % 2 * 8], b + lane * 8);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  sync_warp();
  uint32_t fa[4], fb[2];
  float fd[4] = {};
  ptx::ldmatrix_x4(fa, &tile.a[lane % 16][lane / 16 * 8]);
  ptx::ldmatrix_x2(fb, &tile.b[lane % 8][lane / 8 % 2 * 8]);
  ptx::mma_m16n8k16_bf16(fd, fa, fb);
  for (int e = 0; e < 4; ++e) {
    const auto p = layout::mma_d(lane, e);
    d[p.row * 8 + p.column] = fd[e];
  }
}

DEVICE_TEST(Ptx, MmaMultiplies) {
  const std::vector<bf16> a = small_integers(256, 1), b = small_integers(128, 2);
  const DeviceArray<bf16> da(a), db(b);
  const DeviceArray<float> by_maps(128), by_ldmatrix(128);
  launch<mma_from_maps_kernel>({.blocks = {1}, .threads = {32}}, da.data(), db.data(), by_maps.data());
  launch<mma_from_ldmatrix_kernel>({.blocks = {1}, .threads = {32}, .shared_bytes = sizeof(Tile16)}, da.data(),
                                   db.data(), by_ldmatrix.data());
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float expected = 0;
      for (int k = 0; k < 16; ++k) expected += at(a, m, k, 16) * at(b, n, k, 16);
      EXPECT_EQ(by_maps.values()[static_cast<size_t>(m * 8 + n)], expected);
      EXPECT_EQ(by_ldmatrix.values()[static_cast<size_t>(m * 8 + n)], expected);
    }
  }
}

DEVICE_TEST(Ptx, FragmentMapsCoverEveryElementOnce) {
  int a[16][16] = {}, b[16][8] = {}, d[16][8] = {}, wide[64][256] = {};
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 8; ++e) ++a[layout::mma_a(lane, e).row][layout::mma_a(lane, e).column];
    for (int e = 0; e < 4; ++e) ++b[layout::mma_b(lane, e).row][layout::mma_b(lane, e).column];
    for (int e = 0; e < 4; ++e) ++d[layout::mma_d(lane, e).row][layout::mma_d(lane, e).column];
  }
  for (int t = 0; t < 128; ++t) {
    for (int e = 0; e < 128; ++e) ++wide[layout::wgmma_d(t, e).row][layout::wgmma_d(t, e).column];
  }
  for (int i = 0; i < 256; ++i) EXPECT_EQ(a[i / 16][i % 16], 1);
  for (int i = 0; i < 128; ++i) EXPECT_EQ(b[i / 8][i % 8] * d[i / 8][i % 8], 1);
  for (int i = 0; i < 64 * 256; ++i) EXPECT_EQ(wide[i / 256][i % 256], 1);
}

// PTX ISA, figures of mma.m16n8k16: groupID = lane / 4, threadID_in_group = lane % 4.
//   a_i: row = groupID for (0 <= i < 2 or 4 <= i < 6), else groupID + 8;  col = 2 tig + (i & 1), + 8 from i = 4 on
//   b_i: row = 2 tig + (i & 1), + 8 from i = 2 on; col = groupID.   c_i: row = groupID (+ 8 from i = 2 on); col = 2 tig + (i & 1)
DEVICE_TEST(Ptx, FragmentMapsAreThoseOfThePtxManual) {
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const bool upper = i < 2 || (i >= 4 && i < 6);
      EXPECT_EQ(layout::mma_a(lane, i).row, upper ? group : group + 8);
      EXPECT_EQ(layout::mma_a(lane, i).column, in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0));
    }
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(layout::mma_b(lane, i).row, in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0));
      EXPECT_EQ(layout::mma_b(lane, i).column, group);
      EXPECT_EQ(layout::mma_d(lane, i).row, i < 2 ? group : group + 8);
      EXPECT_EQ(layout::mma_d(lane, i).column, in_group * 2 + (i & 1));
    }
  }
}

struct Rows32 {
  uint16_t row[32][8];
};
__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* plain, uint32_t* transposed) {
  auto& shared = shared_memory<Rows32>();
  const int lane = lane_id();
  for (int i = 0; i < 8; ++i) shared.row[lane][i] = in[lane * 8 + i];
  sync_warp();
  uint32_t r[4], t[4], r2[2], t2[2];
  ptx::ldmatrix_x4(r, shared.row[lane]);
  ptx::ldmatrix_x4_trans(t, shared.row[lane]);
  ptx::ldmatrix_x2(r2, shared.row[lane % 16]);
  ptx::ldmatrix_x2_trans(t2, shared.row[lane % 16]);
  for (int j = 0; j < 4; ++j) {
    plain[j * 32 + lane] = r[j];
    transposed[j * 32 + lane] = t[j];
    if (j < 2 && (r2[j] != r[j] || t2[j] != t[j])) trap();
  }
}

DEVICE_TEST(Ptx, LdmatrixGivesTwoNeighboursOfARowOrColumn) {
  std::vector<uint16_t> in(256);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i * 7);
  const DeviceArray<uint16_t> input(in);
  const DeviceArray<uint32_t> plain(128), transposed(128);
  launch<ldmatrix_kernel>({.blocks = {1}, .threads = {32}, .shared_bytes = sizeof(Rows32)}, input.data(), plain.data(),
                          transposed.data());
  const std::vector<uint32_t> r = plain.values(), t = transposed.values();
  for (size_t j = 0; j < 4; ++j) {
    for (size_t lane = 0; lane < 32; ++lane) {
      const auto element = [&](size_t row, size_t column) {
        return static_cast<uint32_t>(in[(j * 8 + row) * 8 + column]);
      };
      const size_t major = lane / 4, minor = lane % 4 * 2;
      EXPECT_EQ(r[j * 32 + lane], element(major, minor) | element(major, minor + 1) << 16);
      EXPECT_EQ(t[j * 32 + lane], element(minor, major) | element(minor + 1, major) << 16);
    }
  }
}

struct Stages {
  float data[3][64][4];
};
__global__ void cp_async_kernel(const float* in, float* out) {  // three groups in flight, waited for one by one
  auto& shared = shared_memory<Stages>();
  const int t = static_cast<int>(threadIdx.x);
  for (int stage = 0; stage < 3; ++stage) {
    ptx::cp_async_16(shared.data[stage][t], in + (stage * 64 + t) * 4, t == 5 ? 0 : t == 6 ? 8 : 16);
    ptx::cp_async_commit();
  }
  const auto emit = [&](int stage) {
    sync_block();
    for (int i = 0; i < 4; ++i) out[(stage * 64 + t) * 4 + i] = shared.data[stage][63 - t][i];
  };
  ptx::cp_async_wait<2>();
  emit(0);
  ptx::cp_async_wait<1>();
  emit(1);
  ptx::cp_async_4(&shared.data[0][t][0], in + t);
  ptx::cp_async_4(&shared.data[0][t][1], in + t, 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  emit(2);
  out[768 + t * 2] = shared.data[0][t][0];
  out[768 + t * 2 + 1] = shared.data[0][t][1];
}

DEVICE_TEST(Ptx, CpAsyncBringsGroupsInOrderAndZerosBehindTheSource) {
  std::vector<float> in(768);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i + 1);
  const DeviceArray<float> input(in), out(768 + 128);
  launch<cp_async_kernel>({.blocks = {1}, .threads = {64}, .shared_bytes = sizeof(Stages)}, input.data(), out.data());
  const std::vector<float> v = out.values();
  for (size_t i = 0; i < 768; ++i) {
    const size_t stage = i / 256, source = 63 - i / 4 % 64;
    const bool zero = source == 5 || (source == 6 && i % 4 >= 2);
    EXPECT_EQ(v[i], zero ? 0.0f : in[(stage * 64 + source) * 4 + i % 4]) << i;
  }
  for (size_t t = 0; t < 64; ++t) {
    EXPECT_EQ(v[768 + t * 2], in[t]);
    EXPECT_EQ(v[768 + t * 2 + 1], 0.0f);
  }
}

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
