#include "runtime/device_clocks.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "tests/support/files.h"

namespace lightmoe {
namespace {

const char* const kBus = "0000:1B:00.0";

TEST(DeviceClocks, AreReadOfTheGpuAtThatAddress) {
  const std::string nvml = testing::plugin_path("nvml");
  const auto reader = ClockReader::open(kBus, nvml.c_str());
  ASSERT_NE(reader, nullptr);
  const auto clocks = reader->read();
  ASSERT_TRUE(clocks.has_value());
  EXPECT_EQ(clocks->sm_mhz, 1980);
  EXPECT_EQ(clocks->memory_mhz, 3201);
  EXPECT_EQ(ClockReader::open("0000:1C:00.0", nvml.c_str()), nullptr);
  EXPECT_EQ(ClockReader::open("0000:1B:00", nvml.c_str()), nullptr);
}

TEST(DeviceClocks, SamplesUntilStopped) {
  const std::string nvml = testing::plugin_path("nvml");
  const auto reader = ClockReader::open(kBus, nvml.c_str());
  ASSERT_NE(reader, nullptr);
  ClockSampler sampler(reader.get());
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const auto summary = sampler.stop();
  ASSERT_TRUE(summary.has_value());
  EXPECT_EQ(summary->sm_mhz, 1980);
  EXPECT_EQ(summary->sm_mhz_min, 1200);
  EXPECT_EQ(summary->memory_mhz, 3201);
}

TEST(DeviceClocks, NothingWhereNvmlIsNot) {
  EXPECT_EQ(ClockReader::open(kBus, "libno-such-nvml.so"), nullptr);
  EXPECT_EQ(ClockReader::open(kBus, testing::plugin_path("faulty").c_str()),
            nullptr);  // a library without its functions
  EXPECT_FALSE(ClockSampler(nullptr).stop().has_value());
}

}  // namespace
}  // namespace lightmoe
