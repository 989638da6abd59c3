#pragma once
#include <cstdint>
#include <vector>

namespace lightmoe::cases {

// How the tokens choose: at random, all the same slot, one token choosing a slot twice.
enum class Choice { kRandom, kOneSlot, kRepeated };

struct DispatchCase {
  int64_t tokens, slots, top_k,
      groups;  // slot s is in group s * 7 % (groups + 1) - 1: some have none, groups interleave
  Choice choice;
};
inline const std::vector<DispatchCase> dispatch_plan = {
    {0, 4, 2, 2, Choice::kRandom},     {1, 1, 1, 1, Choice::kOneSlot},   {7, 8, 3, 8, Choice::kRandom},
    {31, 8, 2, 3, Choice::kRepeated},  {33, 64, 8, 64, Choice::kRandom}, {129, 64, 8, 5, Choice::kRandom},
    {50, 64, 8, 20, Choice::kOneSlot}, {17, 5, 5, 0, Choice::kRandom},   {1000, 64, 8, 40, Choice::kRandom},
    {2100, 64, 8, 40, Choice::kRandom}};  // more than 32 chunks of the device's sort

}  // namespace lightmoe::cases
