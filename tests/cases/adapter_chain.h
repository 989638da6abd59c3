#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

struct AdapterChainCase {
  int64_t tokens, top_k, hidden, width;
  std::vector<int32_t> group_of_slot;  // -1: no expert
  std::vector<int64_t> rank_of_slot;   // 0: no adapter
  bool skewed = false;                 // every token chooses the same slots
};
// No tokens, one; a base with adapters beside experts kept; ranks that divide no tile, several ranks; all on one base (duplicates of every
// token); no adapter anywhere; slots without expert; one-expert skew over several tiles; widths at and off the chunks of 64.
inline const std::vector<AdapterChainCase> adapter_chain = {
    {0, 2, 8, 16, {0, 0, 1}, {4, 4, 0}},
    {1, 3, 8, 64, {0, 0, 1}, {4, 0, 16}},
    {33, 4, 136, 100, {0, 0, 1, 1, 2, 0, 3}, {16, 16, 5, 5, 0, 16, 0}},
    {70, 4, 40, 64, {0, 0, 0, 0, 0}, {23, 23, 23, 23, 23}},
    {19, 2, 33, 17, {0, 1, 1, 2}, {3, 7, 0, 1}},
    {30, 3, 24, 72, {0, 1, 2, 1}, {0, 0, 0, 0}},
    {21, 3, 64, 65, {0, -1, 0, 1, -1}, {64, 0, 64, 64, 0}},
    {150, 2, 16, 8, {0, 0, 1, 1}, {8, 4, 12, 8}, true},
    {90, 4, 128, 136, {0, 0, 0, 0, 1, 1, 2}, {33, 64, 33, 0, 64, 64, 48}},
};

}  // namespace lightmoe::cases
