#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

struct EmbeddingCase {
  int64_t tokens, vocabulary, width;
};
// No tokens, one, one-word vocabulary (every id the same), odd widths, a slice of OLMoE's table, and more tokens than one block of
// a GPU sorts, by ids of three bytes.
inline const std::vector<EmbeddingCase> embedding = {{0, 5, 8},    {1, 1, 1},     {33, 1, 31},    {7, 3, 129},
                                                     {64, 97, 33}, {31, 131, 64}, {20, 50, 2048}, {4100, 70000, 2}};

}  // namespace lightmoe::cases
