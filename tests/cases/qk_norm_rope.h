#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

struct QkNormRopeCase {
  int64_t tokens, heads, key_heads, head_dim;
  int32_t first_position;
};
// No tokens, the smallest head, odd counts of heads, halves that do not divide into vectors, fewer key heads than heads, several chunks
// of rows, a decode step far out, OLMoE's heads.
inline const std::vector<QkNormRopeCase> qk_norm_rope = {
    {0, 2, 2, 8, 0},   {1, 1, 1, 2, 0},        {5, 3, 1, 6, 1},   {13, 6, 2, 8, 0},
    {31, 2, 2, 62, 7}, {1, 16, 16, 128, 4095}, {70, 4, 2, 16, 0}, {33, 16, 4, 128, 4000},
};

}  // namespace lightmoe::cases
