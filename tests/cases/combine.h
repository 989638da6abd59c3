#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

struct CombineCase {
  int64_t tokens, top_k, visits, width;  // pairs: about three quarters of tokens * top_k
};
// No tokens, one, visits without pairs, all pairs in one visit, odd widths, OLMoE's hidden width.
inline const std::vector<CombineCase> combine = {{0, 2, 0, 8},    {1, 1, 1, 1},     {5, 3, 30, 31},  {17, 8, 1, 33},
                                                 {31, 4, 40, 97}, {64, 8, 200, 64}, {7, 4, 19, 2048}};

}  // namespace lightmoe::cases
