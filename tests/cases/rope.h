#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

struct RopeCase {
  int64_t tokens, heads, head_dim;
  int32_t first_position;
};
// No tokens, the smallest head, odd counts of heads, a decode step far out, OLMoE's heads.
inline const std::vector<RopeCase> rope = {{0, 2, 8, 0},   {1, 1, 2, 0},       {5, 3, 6, 1},       {13, 6, 8, 0},
                                           {31, 2, 62, 7}, {1, 16, 128, 4095}, {33, 16, 128, 4000}};

}  // namespace lightmoe::cases
