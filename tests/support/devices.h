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

// Long lists of combinations are spread over the simulator's seeds, so that its checking builds stay quick: its seed, 0 elsewhere; and
// whether the i-th combination is run now, one of n on the simulator and all elsewhere.
inline size_t part_of_seed() {
  const char* seed = std::getenv("LIGHTMOE_SIM_SEED");
  return default_device() == DeviceKind::kSim && seed != nullptr ? std::strtoull(seed, nullptr, 10) : 0;
}
inline bool is_run_now(size_t i, size_t n) {
  return default_device() != DeviceKind::kSim || (i + part_of_seed()) % n == 0;
}

}  // namespace lightmoe::testing
