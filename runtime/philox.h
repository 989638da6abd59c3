#pragma once
// Philox4x32-10, a counter-based random number generator (Salmon, Moraes, Dror, Shaw: "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011). Value number i of stream (seed, stream) is a pure
// function, so results do not depend on threads or order, and the state to save is one counter.

#include <array>
#include <cmath>
#include <cstdint>

namespace lightmoe {

using PhiloxBlock = std::array<uint32_t, 4>;
// counter = (index low, index high, stream low, stream high), key = seed.
PhiloxBlock philox(uint64_t seed, uint64_t stream, uint64_t index);

class Philox {
 public:
  explicit Philox(uint64_t seed, uint64_t stream = 0) : seed_(seed), stream_(stream) {}
  uint32_t next_u32() {
    if (used_ == 4) {
      block_ = philox(seed_, stream_, index_++);
      used_ = 0;
    }
    return block_[static_cast<size_t>(used_++)];
  }
  uint64_t next_u64() {
    const uint64_t high = next_u32();
    return high << 32 | next_u32();
  }
  double uniform() { return static_cast<double>(next_u64() >> 11) * 0x1p-53; }  // [0, 1)
  uint64_t below(uint64_t n);                                                   // unbiased, [0, n)
  double normal();                                                              // Box-Muller, uses two uniforms a value

  // Position: number of 32-bit values drawn. seek restores it exactly.
  uint64_t position() const { return index_ * 4 - static_cast<uint64_t>(4 - used_); }
  void seek(uint64_t position) {
    index_ = position / 4;
    used_ = 4;
    for (uint64_t i = 0; i < position % 4; ++i) next_u32();
  }
  uint64_t seed() const { return seed_; }
  uint64_t stream() const { return stream_; }

 private:
  uint64_t seed_, stream_, index_ = 0;
  PhiloxBlock block_{};
  int used_ = 4;
};

// data[i] = mean 0, standard deviation `stddev`; element i depends on (seed, stream, i) alone.
void fill_normal(float* data, int64_t count, float stddev, uint64_t seed, uint64_t stream);

}  // namespace lightmoe
