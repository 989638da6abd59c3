#include "runtime/device_room.h"

#include "runtime/device.h"
#include "runtime/error.h"

namespace lightmoe {

void require_device_room(int64_t bytes, const std::string& what, const std::string& hint) {
  const int64_t room = device_free_bytes(), limit = device_memory_limit();
  if (default_device() == DeviceKind::kCpu || room < 0 || bytes <= room) return;
  const auto mib = [](int64_t b) { return static_cast<double>(b) / 1048576; };
  const std::string cap = limit > 0 ? fmt::format(" (--max-gpu-memory {:.1f} MiB)", mib(limit)) : "";
  fail(ErrorKind::kMemory, "{} takes about {:.1f} MiB of {} memory, {:.1f} MiB are free{}; {}", what, mib(bytes),
       name_of(default_device()), mib(room), cap, hint);
}

}  // namespace lightmoe
