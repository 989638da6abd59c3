#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

struct RouterCase {
  int64_t tokens, width, slots, top_k;
};
// No tokens, one slot, all slots chosen, odd sizes, the golden checkpoints' shapes, OLMoE's.
inline const std::vector<RouterCase> router = {{0, 8, 4, 2},   {1, 1, 1, 1},    {3, 31, 5, 5},   {17, 33, 7, 3},
                                               {13, 64, 8, 2}, {42, 48, 12, 3}, {31, 97, 64, 8}, {9, 2048, 64, 8}};

}  // namespace lightmoe::cases
