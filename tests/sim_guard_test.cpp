// LIGHTMOE_SIM_GUARD: the host may not touch the simulated device's memory. Run in processes of their own, which read the variable.

#include <cstdlib>

#include "kernels/rms_norm.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

class SimGuard : public ::testing::Test {
 protected:
  void SetUp() override {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    setenv("LIGHTMOE_SIM_GUARD", "1", 1);
  }
  void TearDown() override { unsetenv("LIGHTMOE_SIM_GUARD"); }
};

Tensor ones_on_device() { return Tensor::from(std::vector<float>(7 * 33, 1.0f), {7, 33}).on(DeviceKind::kSim); }

TEST_F(SimGuard, AHostReadEndsTheProcessWithABacktrace) {
  EXPECT_DEATH(
      {
        volatile float x = ones_on_device().data<float>()[3];
        (void)x;
      },
      "the host touches device memory");
}

[[noreturn]] void use_device_memory() {
  const Tensor x = ones_on_device(), w = Tensor::from(std::vector<float>(33, 2.0f), {33}).on(DeviceKind::kSim);
  const Tensor y = Tensor::empty({7, 33}, DType::kF32, DeviceKind::kSim);
  run(RmsNorm{.x = x, .w = w, .eps = 0, .y = y});
  const bool right = y.on(DeviceKind::kCpu).data<float>()[230] == 2.0f;
  y.fill_zero();
  const bool zero = y.to(DType::kBF16).to(DType::kF32).on(DeviceKind::kCpu).data<float>()[0] == 0.0f;
  std::exit(right && zero ? 0 : 1);
}

TEST_F(SimGuard, KernelsCopiesAndFillsMayTouchIt) {
  EXPECT_EXIT(use_device_memory(), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace lightmoe
