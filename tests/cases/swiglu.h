#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

struct SwiGluCase {
  int64_t rows, width;  // of a
};
// No rows (an expert without tokens), one element, odd widths, and OLMoE's expert width.
inline const std::vector<SwiGluCase> swiglu = {{0, 8},   {1, 1},   {3, 15},   {2, 31},
                                               {31, 33}, {65, 97}, {129, 64}, {33, 1024}};

}  // namespace lightmoe::cases
