#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

struct DistillationCase {
  int64_t rows, width, teacher_width, vocabulary, chunk_rows;
  double weight, temperature;
};
// No rows, one token, vocabularies around a vector and a block of threads, chunks that divide nothing, hard and soft ends of the mixture.
inline const std::vector<DistillationCase> distillation = {
    {0, 4, 4, 5, 0, .5, 1},    {1, 1, 1, 1, 0, .5, 2},    {7, 5, 5, 31, 3, .3, 2},
    {33, 16, 8, 257, 0, 1, 1}, {17, 8, 8, 1031, 5, 0, 3}, {13, 33, 33, 509, 64, .7, .5},
};

}  // namespace lightmoe::cases
