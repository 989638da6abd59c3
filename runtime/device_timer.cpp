#include "runtime/device_timer.h"

#include <array>

#include "runtime/device.h"

namespace lightmoe {
namespace {

std::array<DeviceEvents, kNumDeviceKinds>& events() {
  static std::array<DeviceEvents, kNumDeviceKinds> table = {};  // filled by static objects of other files
  return table;
}

}  // namespace

void register_device_events(DeviceKind device, const DeviceEvents& of) { events()[static_cast<size_t>(device)] = of; }

void DeviceTimer::start() {
  if (const auto record = events()[static_cast<size_t>(device_)].record) return record(0);
  wait_for_device(device_);
  begin_ = std::chrono::steady_clock::now();
}

double DeviceTimer::stop_us() {
  const DeviceEvents& of = events()[static_cast<size_t>(device_)];
  if (of.record != nullptr) return of.record(1), of.elapsed_us();
  wait_for_device(device_);
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin_).count();
}

}  // namespace lightmoe
