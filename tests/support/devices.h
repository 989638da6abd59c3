#pragma once
// The devices an op's test runs on: cpu, sim, and cuda where the build and the machine have one. LIGHTMOE_TEST_DEVICES=sim,cpu
// restricts. random_tensor, Guarded, Tensor::empty and zeros make their tensors on the device of the moment; close, bits_equal and
// to_doubles read from any. Tests touch elements through data<T>() on cpu and sim only: bring others over with .on(DeviceKind::kCpu).

#include <cstdlib>
#include <string>
#include <vector>

#include "runtime/dispatch.h"
#include "tests/support/testing.h"

namespace lightmoe::testing {

inline std::vector<DeviceKind> devices() {
  const char* list = std::getenv("LIGHTMOE_TEST_DEVICES");
  const std::string wanted = list != nullptr ? std::string(",") + list + "," : ",cpu,sim,cuda,";
  std::vector<DeviceKind> present;
  for (const DeviceKind device : {DeviceKind::kCpu, DeviceKind::kSim, DeviceKind::kCuda}) {
    const bool named = wanted.find("," + std::string(name_of(device)) + ",") != std::string::npos;
    if (named && device_available(device)) present.push_back(device);
  }
  return present;
}

// Runs the body once on each device that has kernels for all of the named ops:
//   testing::on_each_device<RmsNorm, RmsNormBackward>([] { check_case(...); });
template <class... Ops, class Body>
void on_each_device(Body&& body) {
  for (const DeviceKind device : devices()) {
    if (!(has_kernel<Ops>(device) && ...)) continue;
    const DeviceScope scope(device);
    SCOPED_TRACE(::testing::Message() << "device " << name_of(device));
    body();
  }
}

// Types the kernels of the current device take.
inline std::vector<DType> floating_dtypes() {
  if (default_device() == DeviceKind::kCpu) return {DType::kF32, DType::kBF16, DType::kF64};
  return {DType::kF32, DType::kBF16};
}

}  // namespace lightmoe::testing
