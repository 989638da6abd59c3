#include "kernels/cpu_math.h"

#include <limits>

#include "tests/support/testing.h"

namespace lightmoe {
namespace {

double spacing_at(double value) {
  const double magnitude = std::abs(value);
  if (magnitude < 0x1p-126) return 0x1p-149;
  return std::ldexp(1.0, std::ilogb(magnitude) - 23);
}

// Every 4099th float (a prime, so that all low bits occur) over the range with a finite, non-zero result.
TEST(CpuMath, ExpIsWithinTheDocumentedError) {
  double worst = 0;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 4099) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (!(x > -104.0f && x < 88.722f)) continue;
    const double expected = std::exp(static_cast<double>(x));
    worst = std::max(worst, std::abs(static_cast<double>(exp_of(x)) - expected) / spacing_at(expected));
  }
  EXPECT_LE(worst, 0.95);
  RecordProperty("worst_ulp_thousandths", static_cast<int>(1000 * worst));
}

TEST(CpuMath, ExpAtTheEdges) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(exp_of(0.0f), 1.0f);
  EXPECT_EQ(exp_of(-0.0f), 1.0f);
  EXPECT_EQ(exp_of(kInfinity), kInfinity);
  EXPECT_EQ(exp_of(-kInfinity), 0.0f);
  EXPECT_EQ(exp_of(89.0f), kInfinity);
  EXPECT_EQ(exp_of(-105.0f), 0.0f);
  EXPECT_EQ(exp_of(-103.5f), 0x1p-149f);  // the smallest subnormal is reached
  EXPECT_TRUE(std::isnan(exp_of(std::numeric_limits<float>::quiet_NaN())));
  EXPECT_TRUE(std::isnan(exp_of(-std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace
}  // namespace lightmoe
