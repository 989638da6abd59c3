#include "runtime/philox.h"

#include "runtime/parallel.h"

namespace lightmoe {
namespace {
constexpr double kTwoPi = 6.283185307179586476925286766559;
}

PhiloxBlock philox(uint64_t seed, uint64_t stream, uint64_t index) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

uint64_t Philox::below(uint64_t n) {
  const uint64_t limit = n == 0 ? 0 : (~uint64_t{0} - n + 1) % n;  // 2^64 mod n
  uint64_t value = next_u64();
  while (value < limit) value = next_u64();
  return n == 0 ? 0 : value % n;
}

double Philox::normal() {
  const double u = 1.0 - uniform();  // (0, 1]
  const double v = uniform();
  return std::sqrt(-2.0 * std::log(u)) * std::cos(kTwoPi * v);
}

void fill_normal(float* data, int64_t count, float stddev, uint64_t seed, uint64_t stream) {
  parallel_for(0, (count + 3) / 4, 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const PhiloxBlock r = philox(seed, stream, static_cast<uint64_t>(b));
      for (int64_t j = 0; j < 2; ++j) {
        const float u = (static_cast<float>(r[static_cast<size_t>(2 * j)] >> 8) + 1.0f) * 0x1p-24f;
        const float v = static_cast<float>(r[static_cast<size_t>(2 * j + 1)] >> 8) * 0x1p-24f;
        const float radius = stddev * std::sqrt(-2.0f * std::log(u));
        const float angle = static_cast<float>(kTwoPi) * v;
        if (4 * b + 2 * j < count) data[4 * b + 2 * j] = radius * std::cos(angle);
        if (4 * b + 2 * j + 1 < count) data[4 * b + 2 * j + 1] = radius * std::sin(angle);
      }
    }
  });
}

}  // namespace lightmoe
