#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

// Sizes of the tensors of one step: empty, tiny, around a chunk of work, and many.
inline const std::vector<std::vector<int64_t>> adamw = {
    {0}, {1}, {31, 0, 33}, {16383, 16384, 16385}, {5, 40000, 7, 129, 3, 997}};

}  // namespace lightmoe::cases
