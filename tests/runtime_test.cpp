#include <cmath>
#include <cstring>
#include <limits>

#include "runtime/memory.h"
#include "runtime/parallel.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

TEST(DType, Bf16RoundTripsEveryPattern) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    bf16 value;
    value.bits = static_cast<uint16_t>(bits);
    const float wide = static_cast<float>(value);
    const bf16 back(wide);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(static_cast<float>(back))) << bits;
      EXPECT_EQ(back.bits & 0x8000u, bits & 0x8000u) << bits;
    } else {
      EXPECT_EQ(back.bits, bits);
    }
  }
}

// Between every two neighbouring bf16 values: the nearer one, ties to the even pattern, overflow to
// infinity.
TEST(DType, Bf16RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7f80u; ++bits) {
    const uint32_t low = bits << 16;
    const auto rounded = [](uint32_t pattern) { return bf16(std::bit_cast<float>(pattern)).bits; };
    EXPECT_EQ(rounded(low | 0x7fffu), bits);
    EXPECT_EQ(rounded(low | 0x8000u), bits + (bits & 1u));
    EXPECT_EQ(rounded(low | 0x8001u), bits + 1);
    EXPECT_EQ(rounded(low | 0x80008001u), (bits + 1) | 0x8000u);
  }
  for (const uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffffffffu, 0x7f80ffffu}) {
    EXPECT_TRUE(std::isnan(static_cast<float>(bf16(std::bit_cast<float>(nan)))));
  }
}

TEST(DType, F16RoundTripsEveryPatternAndRounds) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    f16 value;
    value.bits = static_cast<uint16_t>(bits);
    const float wide = static_cast<float>(value);
    if (std::isnan(wide))
      EXPECT_TRUE(std::isnan(static_cast<float>(f16(wide))));
    else
      EXPECT_EQ(f16(wide).bits, bits);
  }
  EXPECT_EQ(f16(65519.99f).bits, 0x7bffu);
  EXPECT_EQ(f16(65520.0f).bits, 0x7c00u);
  EXPECT_EQ(f16(0x1p-25f).bits, 0u);  // tie to even zero
  EXPECT_EQ(f16(0x1.8p-25f).bits, 1u);
  EXPECT_EQ(f16(1.0f + 0x1p-11f).bits, 0x3c00u);
}

TEST(Memory, CountsLiveAndPeakPerCategory) {
  reset_peak_memory();
  const int64_t before = memory_use(MemoryCategory::kOptimizer).live_bytes;
  {
    const MemoryScope scope(MemoryCategory::kOptimizer);
    Tensor a = Tensor::empty({1000}, DType::kF32);
    { const Tensor b = Tensor::empty({3 << 20}, DType::kU8); }
    const Tensor view = a.slice(10, 20);
    a.reset();
    EXPECT_EQ(memory_use(MemoryCategory::kOptimizer).live_bytes - before,
              4000);  // the view keeps it
  }
  EXPECT_EQ(memory_use(MemoryCategory::kOptimizer).live_bytes, before);
  EXPECT_EQ(memory_use(MemoryCategory::kOptimizer).peak_bytes - before, 4000 + (3 << 20));
  EXPECT_EQ(MemoryScope::current(), MemoryCategory::kActivations);
}

TEST(Memory, AlignsToCacheLines) {
  for (const int64_t n : {1, 63, 1000, 1 << 20, (5 << 20) + 3}) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(Tensor::empty({n}, DType::kU8).raw()) % 64, 0u);
  }
}

TEST(Parallel, CoversTheRangeOnceAndRethrows) {
  for (const int64_t n : {0, 1, 2, 31, 1000}) {
    std::vector<int> seen(static_cast<size_t>(n), 0);
    parallel_for(0, n, 3, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) ++seen[static_cast<size_t>(i)];
    });
    parallel_items(n, [&](int64_t i) { ++seen[static_cast<size_t>(i)]; });
    for (const int s : seen) EXPECT_EQ(s, 2);
  }
  EXPECT_THROW(parallel_for(0, 100, 1, [](int64_t, int64_t) { fail(ErrorKind::kInternal, "x"); }), Error);
}

// Known answers of the reference implementation (Random123 kat_vectors, philox4x32 10 rounds).
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox(0, 0, 0), (PhiloxBlock{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
  EXPECT_EQ(philox(~0ull, ~0ull, ~0ull), (PhiloxBlock{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
  EXPECT_EQ(philox(0x299f31d0a4093822ull, 0x0370734413198a2eull, 0x85a308d3243f6a88ull),
            (PhiloxBlock{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

TEST(Philox, SeekContinuesTheSequence) {
  Philox a(5, 9);
  for (int i = 0; i < 7; ++i) a.next_u32();
  Philox b(5, 9);
  b.seek(a.position());
  for (int i = 0; i < 20; ++i) EXPECT_EQ(a.next_u32(), b.next_u32());
  for (int i = 0; i < 1000; ++i) EXPECT_LT(a.below(7), 7u);
}

TEST(Philox, NormalHasItsMoments) {
  std::vector<float> values(100001);
  fill_normal(values.data(), static_cast<int64_t>(values.size()), 2.0f, 3, 4);
  double mean = 0, square = 0;
  for (const float v : values) mean += v, square += static_cast<double>(v) * v;
  mean /= static_cast<double>(values.size()), square /= static_cast<double>(values.size());
  EXPECT_NEAR(mean, 0, 5 * 2 / std::sqrt(100001.0));  // five standard errors
  EXPECT_NEAR(square, 4, 5 * 4 * std::sqrt(2 / 100001.0));
}

TEST(Tensor, ViewsShareAndChecksThrow) {
  const Tensor t = Tensor::from<float>({1, 2, 3, 4, 5, 6}, {3, 2});
  EXPECT_EQ(t.slice(1, 3).data<float>()[0], 3);
  EXPECT_EQ(t.row(2).shape(), Shape({2}));
  EXPECT_TRUE(t.row(2).shares_buffer_with(t));
  EXPECT_THROW(t.slice(2, 4), Error);
  EXPECT_THROW(t.data<double>(), Error);
  EXPECT_THROW(t.reshape({4}), Error);
  EXPECT_TRUE(Tensor::empty({0, 4}, DType::kF32).defined());
  EXPECT_FALSE(Tensor().defined());
}

}  // namespace
}  // namespace lightmoe
