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
    {0, 5, 7},     {5, 0, 7},     {5, 7, 0},     {1, 1, 1},      {1, 31, 33},  {1, 64, 256}, {2, 33, 31},
    {3, 97, 65},   {4, 48, 17},   {5, 130, 67},  {8, 32, 64},    {13, 31, 29}, {14, 32, 16}, {15, 33, 15},
    {28, 65, 127}, {31, 17, 40},  {64, 64, 2},   {97, 101, 3},   {1, 7, 600},  {43, 35, 41}, {33, 29, 523},
    {9, 1031, 37}, {401, 19, 23}, {37, 521, 33}, {15, 17, 1030},
};

// Stored rows that begin at multiples of 16 bytes, where tensor-core backends work: ragged in the rest, around the tiles (64, 128) and the
// steps of k (32) of the GPU backends, some large enough for their large tiles.
inline const std::vector<GemmCase> gemm_aligned = {
    {1, 8, 8},     {5, 64, 40},  {16, 16, 0},     {17, 72, 24},   {64, 64, 32},
    {65, 136, 96}, {72, 8, 264}, {200, 264, 104}, {128, 520, 64}, {264, 136, 72},
};

// Rows per group: empty groups, one group with everything, few-row groups beside large ones.
struct GroupedCase {
  std::vector<int64_t> rows;
  int64_t n, k;  // GroupedGemmK: k is M
};
inline const std::vector<GroupedCase> grouped_gemm = {
    {{0}, 5, 7},          {{0, 0, 0}, 8, 8},      {{1}, 1, 1},           {{3, 0, 1, 17}, 33, 31},
    {{0, 29, 0}, 17, 65}, {{1, 1, 1, 1}, 64, 48}, {{31, 2, 33}, 97, 13}, {{5, 14, 0, 28, 1}, 35, 67},
    {{40, 3}, 129, 66},
};

inline const std::vector<GroupedCase> grouped_gemm_aligned = {
    {{0, 0}, 8, 8},       {{3, 0, 1, 17}, 40, 32},     {{0, 130, 0}, 72, 64},
    {{1, 1, 70}, 64, 8},  {{5, 14, 0, 33, 1}, 32, 72}, {{140, 0, 260, 129}, 136, 40},
    {{100, 9}, 264, 136},
};

// Shapes worth timing. Grouped: m (k for grouped_k) rows in all, spread over the groups as a random router would.
struct GemmBenchCase {
  const char* kind;   // dense, grouped_m, grouped_k
  const char* trans;  // nn, nt, tn
  int64_t m, n, k, groups;
};
inline const std::vector<GemmBenchCase> gemm_bench = {
    {"dense", "nn", 1024, 1024, 1024, 1},
    {"dense", "nt", 1024, 1024, 1024, 1},
    {"dense", "tn", 1024, 1024, 1024, 1},
    // mid: T 1024, D 1024, F 512, E 32, K 8: gate/up, its dX, its dW, down, and the LM head
    {"grouped_m", "nt", 8192, 1024, 1024, 32},
    {"grouped_m", "nn", 8192, 1024, 1024, 32},
    {"grouped_k", "tn", 1024, 1024, 8192, 32},
    {"grouped_m", "nt", 8192, 1024, 512, 32},
    {"grouped_k", "tn", 1024, 512, 8192, 32},
    {"dense", "nt", 1024, 8192, 1024, 1},
    // tiny: T 1024, D 256, F 128, E 16, K 4
    {"grouped_m", "nt", 4096, 256, 256, 16},
    {"grouped_k", "tn", 256, 256, 4096, 16},
    // OLMoE 1B-7B, prefill of 512 tokens: gate/up, down, attention
    {"grouped_m", "nt", 4096, 2048, 2048, 64},
    {"grouped_m", "nt", 4096, 2048, 1024, 64},
    {"dense", "nt", 512, 2048, 2048, 1},
    // decode of one token: gate/up of 8 experts, attention, LM head; and of four
    {"grouped_m", "nt", 8, 2048, 2048, 8},
    {"dense", "nt", 1, 2048, 2048, 1},
    {"dense", "nt", 1, 50304, 2048, 1},
    {"dense", "nt", 4, 50304, 2048, 1},
    // adapters of rank 16 in mid
    {"grouped_m", "nt", 8192, 16, 1024, 32},
    {"grouped_m", "nt", 8192, 1024, 16, 32},
    {"grouped_k", "tn", 16, 1024, 8192, 32},
};

}  // namespace lightmoe::cases
