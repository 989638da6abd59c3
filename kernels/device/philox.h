#pragma once
// Philox4x32-10 as runtime/philox.h, on the device: value number `index` (64 bits) of stream (seed, stream).

#include "kernels/device/simt.h"

namespace lightmoe::LIGHTMOE_DEVICE {

DEVICE_FN unsigned long long philox_u64(uint64_t seed, uint64_t stream, uint64_t index) {
  const uint64_t block = index / 2;
  uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(stream),
                   static_cast<uint32_t>(stream >> 32)};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[1] = static_cast<uint32_t>(p1), c[3] = static_cast<uint32_t>(p0);
    c[0] = n0, c[2] = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const bool odd = index % 2 != 0;
  return static_cast<unsigned long long>(odd ? c[2] : c[0]) << 32 | (odd ? c[3] : c[1]);
}

}  // namespace lightmoe::LIGHTMOE_DEVICE
