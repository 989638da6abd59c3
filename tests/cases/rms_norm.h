#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

struct RmsNormCase {
  int64_t rows, width;
};
// Zero rows, one element, sizes around a vector and a block, a prime, and OLMoE's own width.
inline const std::vector<RmsNormCase> rms_norm = {{0, 8},  {1, 1},    {1, 31},  {3, 33},    {17, 64},
                                                  {5, 97}, {33, 127}, {2, 129}, {16, 2048}, {31, 2048}};

}  // namespace lightmoe::cases
