#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace lightmoe::cases {

struct AttentionSequence {
  int32_t queries, k_count, q_pos, k_gap;  // k_gap: key rows before this sequence's that nobody owns
};
struct AttentionCase {
  const char* name;
  int64_t heads, kv_heads, head_dim;
  std::vector<AttentionSequence> sequences;
};
// Blocks of the CPU version are 64 keys; sizes stand around them. Decode: few queries at the end of a long cache.
inline const std::vector<AttentionCase> attention = {
    {"nothing", 2, 1, 8, {}},
    {"one token", 1, 1, 2, {{1, 1, 0, 0}}},
    {"small", 2, 2, 6, {{5, 5, 0, 0}}},
    {"gqa, odd head", 6, 3, 31, {{21, 21, 0, 0}, {21, 21, 0, 0}}},
    {"packed documents",
     4,
     2,
     16,
     {{1, 1, 0, 0}, {33, 33, 0, 0}, {0, 0, 0, 0}, {64, 64, 0, 0}, {65, 65, 0, 0}, {7, 7, 0, 0}}},
    {"around blocks", 2, 1, 32, {{63, 63, 0, 0}, {64, 64, 0, 0}, {65, 65, 0, 0}, {129, 129, 0, 0}}},
    {"right padding", 2, 2, 8, {{13, 9, 0, 0}, {13, 13, 0, 4}}},
    {"left padding: queries before the first key", 2, 2, 8, {{13, 9, -4, 0}, {5, 0, 0, 0}}},
    {"prefill into a cache", 4, 4, 16, {{20, 20, 0, 0}, {17, 17, 0, 44}, {3, 3, 0, 10}}},
    {"decode", 8, 2, 64, {{1, 200, 199, 0}, {1, 1, 0, 56}, {1, 64, 63, 20}, {3, 130, 127, 5}}},
    {"OLMoE's head width", 3, 3, 128, {{70, 70, 0, 0}}},
    {"heads of 64", 2, 2, 64, {{130, 130, 0, 3}, {1, 1, 0, 0}, {64, 64, 0, 0}, {128, 128, 0, 1}}},
    {"heads of 128, keys before and behind the queries",
     1,
     1,
     128,
     {{257, 257, 0, 0}, {40, 150, 110, 2}, {20, 9, -4, 0}, {5, 0, 0, 0}}},
    {"long decode", 2, 2, 128, {{1, 700, 699, 0}}}};

}  // namespace lightmoe::cases
