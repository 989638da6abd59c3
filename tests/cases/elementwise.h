#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

// Element counts: none, one, around a vector, around a block of work, and enough for several threads.
inline const std::vector<int64_t> elementwise = {0, 1, 15, 31, 33, 1023, 1024, 1025, 16384 * 2 + 7, 100003};

}  // namespace lightmoe::cases
