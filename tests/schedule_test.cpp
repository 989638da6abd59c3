// The learning rates at every edge, exact where the formula is exact, and against an independent double version elsewhere.

#include "autograd/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

#include "runtime/error.h"

namespace lightmoe {
namespace {

Schedule make(ScheduleKind kind, int64_t total, int64_t warmup, double min_ratio = 0) {
  return {.kind = kind, .peak_lr = 2e-3, .total_steps = total, .warmup_steps = warmup, .min_ratio = min_ratio};
}

TEST(Schedule, WarmUpIsLinearAndReachesThePeakExactly) {
  for (const auto kind : {ScheduleKind::kConstant, ScheduleKind::kLinear, ScheduleKind::kCosine, ScheduleKind::kWsd}) {
    const Schedule s = make(kind, 100, 8, 0.1);
    EXPECT_EQ(s.lr(1), 2e-3 / 8) << name_of(kind);
    EXPECT_EQ(s.lr(4), 2e-3 / 2) << name_of(kind);
    EXPECT_EQ(s.lr(8), 2e-3) << name_of(kind);
    EXPECT_LE(s.lr(9), 2e-3) << name_of(kind);
  }
}

TEST(Schedule, WithoutWarmUpTheFirstStepHasThePeak) {
  for (const auto kind : {ScheduleKind::kConstant, ScheduleKind::kLinear, ScheduleKind::kCosine, ScheduleKind::kWsd}) {
    EXPECT_EQ(make(kind, 10, 0).lr(1), 2e-3) << name_of(kind);
    EXPECT_EQ(make(kind, 1, 0).lr(1), 2e-3) << name_of(kind);
    EXPECT_EQ(make(kind, 1, 1).lr(1), 2e-3) << name_of(kind);
    EXPECT_EQ(make(kind, 7, 7).lr(7), 2e-3) << name_of(kind);
  }
}

TEST(Schedule, TheFloorBelongsToTheStepAfterTheLast) {
  for (const auto kind : {ScheduleKind::kLinear, ScheduleKind::kCosine, ScheduleKind::kWsd}) {
    const Schedule s = make(kind, 50, 5, 0.25);
    EXPECT_GT(s.lr(50), 0.25 * 2e-3) << name_of(kind);
    EXPECT_EQ(s.lr(51), 0.25 * 2e-3) << name_of(kind);
    EXPECT_EQ(s.lr(1000), 0.25 * 2e-3) << name_of(kind);
    EXPECT_GT(make(kind, 50, 5, 0).lr(50), 0) << name_of(kind);
  }
  EXPECT_EQ(make(ScheduleKind::kConstant, 50, 5, 0.25).lr(1000), 2e-3);
}

TEST(Schedule, LinearAndCosineFollowTheirFormulas) {
  const double pi = std::acos(-1.0);
  for (const int64_t warmup : {0, 1, 13}) {
    const Schedule linear = make(ScheduleKind::kLinear, 101, warmup, 0.1);
    const Schedule cosine = make(ScheduleKind::kCosine, 101, warmup, 0.1);
    const int64_t first = warmup == 0 ? 1 : warmup;
    for (int64_t step = first; step <= 101; ++step) {
      const double p = double(step - first) / double(102 - first);
      EXPECT_NEAR(linear.lr(step), 2e-3 * (1 - 0.9 * p), 1e-18);
      EXPECT_NEAR(cosine.lr(step), 2e-3 * (0.1 + 0.45 * (1 + std::cos(pi * p))), 1e-18);
    }
  }
}

TEST(Schedule, WsdIsFlatAndThenFallsOverTheLastPart) {
  Schedule s = make(ScheduleKind::kWsd, 100, 10, 0);
  s.decay_fraction = 0.2;
  for (int64_t step = 10; step <= 80; ++step) EXPECT_EQ(s.lr(step), 2e-3);
  EXPECT_NEAR(s.lr(81), 2e-3 * 20 / 21, 1e-18);
  EXPECT_NEAR(s.lr(100), 2e-3 * 1 / 21, 1e-18);
  s.decay_fraction = 0;
  EXPECT_EQ(s.lr(100), 2e-3);
  s.decay_fraction = 1;  // the fall never starts before the warm-up is over
  EXPECT_EQ(s.lr(10), 2e-3);
  EXPECT_LT(s.lr(11), 2e-3);
}

TEST(Schedule, NeverRisesAfterTheWarmUp) {
  for (const auto kind : {ScheduleKind::kConstant, ScheduleKind::kLinear, ScheduleKind::kCosine, ScheduleKind::kWsd}) {
    const Schedule s = make(kind, 57, 3, 0.01);
    for (int64_t step = 3; step < 60; ++step) EXPECT_GE(s.lr(step), s.lr(step + 1)) << name_of(kind) << step;
  }
}

TEST(Schedule, WarmUpAsStepsRatioOrPercentage) {
  EXPECT_EQ(parse_warmup("0", 1000), 0);
  EXPECT_EQ(parse_warmup("100", 1000), 100);
  EXPECT_EQ(parse_warmup("1", 1000), 1);
  EXPECT_EQ(parse_warmup("0.03", 1000), 30);
  EXPECT_EQ(parse_warmup("3%", 1000), 30);
  EXPECT_EQ(parse_warmup("0.1", 7), 1);
  for (const char* bad : {"", "x", "-1", "1.5", "101%", "%", "1e400", "nan", "3 %"}) {
    EXPECT_THROW(parse_warmup(bad, 1000), Error) << bad;
  }
}

TEST(Schedule, BadValuesAreUsageErrors) {
  const auto bad = [](auto change) {
    Schedule s = make(ScheduleKind::kCosine, 10, 2);
    change(s);
    try {
      s.check_valid();
    } catch (const Error& error) {
      return error.kind() == ErrorKind::kUsage;
    }
    return false;
  };
  EXPECT_TRUE(bad([](Schedule& s) { s.total_steps = 0; }));
  EXPECT_TRUE(bad([](Schedule& s) { s.warmup_steps = 11; }));
  EXPECT_TRUE(bad([](Schedule& s) { s.peak_lr = NAN; }));
  EXPECT_TRUE(bad([](Schedule& s) { s.min_ratio = 1.5; }));
  EXPECT_TRUE(bad([](Schedule& s) { s.decay_fraction = -0.1; }));
  EXPECT_THROW(parse_schedule_kind("cosin"), Error);
  EXPECT_EQ(parse_schedule_kind("wsd"), ScheduleKind::kWsd);
}

}  // namespace
}  // namespace lightmoe
