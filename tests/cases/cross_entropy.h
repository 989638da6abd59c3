#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

struct CrossEntropyCase {
  int64_t rows, width, vocabulary, chunk_rows;
};
// No rows, one token, vocabularies around a vector and a summation block, chunks that divide nothing.
inline const std::vector<CrossEntropyCase> cross_entropy = {
    {0, 4, 5, 0},     {1, 1, 1, 0},    {1, 3, 2, 1},     {7, 5, 31, 3},
    {33, 16, 257, 0}, {31, 17, 33, 8}, {17, 8, 1031, 5}, {13, 33, 509, 64},
};

}  // namespace lightmoe::cases
