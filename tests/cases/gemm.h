#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

struct GemmCase {
  int64_t m, n, k;
};
// Nothing, one, sizes around vectors (16, 32), around register tiles (6, 12, 14) and the few-row path, primes,
// and one over each cache block.
inline const std::vector<GemmCase> gemm = {
    {0, 5, 7},   {5, 0, 7},    {5, 7, 0},   {1, 1, 1},    {1, 31, 33},   {1, 64, 256},  {2, 33, 31},   {3, 97, 65},
    {4, 48, 17}, {5, 130, 67}, {8, 32, 64}, {13, 31, 29}, {14, 32, 16},  {15, 33, 15},  {28, 65, 127}, {31, 17, 40},
    {64, 64, 2}, {97, 101, 3}, {1, 7, 600}, {43, 35, 41}, {33, 29, 523}, {9, 1031, 37}, {257, 19, 23}, {67, 521, 33},
};

// Rows per group: empty groups, one group with everything, few-row groups beside large ones.
struct GroupedCase {
  std::vector<int64_t> rows;
  int64_t n, k;  // GroupedGemmK: k is M
};
inline const std::vector<GroupedCase> grouped_gemm = {
    {{0}, 5, 7},          {{0, 0, 0}, 8, 8},      {{1}, 1, 1},           {{3, 0, 1, 17}, 33, 31},
    {{0, 29, 0}, 17, 65}, {{1, 1, 1, 1}, 64, 48}, {{31, 2, 33}, 97, 13}, {{5, 14, 0, 28, 1}, 35, 67},
    {{40, 3}, 129, 130},
};

}  // namespace lightmoe::cases
