#pragma once
// A place in a ring of stages in shared memory and the parity of the mbarrier phase it stands for. Producer and consumers each have their own
// and go round alike: a producer waits for `free` with parity ^ 1, a consumer for `full` with parity.

#include "kernels/device/ptx_hopper.h"

namespace lightmoe::LIGHTMOE_DEVICE {

template <int kStages>
struct StageRing {
  int stage = 0;
  uint32_t parity = 0;
  DEVICE_FN void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

}  // namespace lightmoe::LIGHTMOE_DEVICE
