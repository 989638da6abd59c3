#pragma once
// Which slots tokens choose in the benchmarks of layers and their products, and for how many tokens.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "bench/op_bench.h"

namespace lightmoe::bench {

// uniform; skewed: slot s as likely as 1 / (1 + s); one: every token chooses the same slots.
enum class RoutingKind : uint8_t { kUniform, kSkewed, kOne };
inline constexpr const char* kRoutingNames[] = {"uniform", "skewed", "one"};

// K different slots for each token [T*K], drawn without replacement by weight.
inline std::vector<int32_t> choose_slots(int64_t tokens, int64_t slots, int64_t k, RoutingKind routing) {
  Philox random(9);
  std::vector<int32_t> all;
  std::vector<std::pair<double, int32_t>> keys(static_cast<size_t>(slots));
  for (int64_t t = 0; t < tokens; ++t) {
    // Exponential keys: the smallest K are a weighted draw (Efraimidis and Spirakis 2006).
    for (int32_t s = 0; s < slots; ++s) {
      const double weight = routing == RoutingKind::kSkewed ? 1.0 / (1 + s) : 1;
      const double key = routing == RoutingKind::kOne ? s : -std::log(1 - random.uniform()) / weight;
      keys[static_cast<size_t>(s)] = {key, s};
    }
    std::partial_sort(keys.begin(), keys.begin() + k, keys.end());
    for (int64_t i = 0; i < k; ++i) all.push_back(keys[static_cast<size_t>(i)].second);
  }
  return all;
}

// On a GPU what LIGHTMOE_BENCH_TOKENS lists, or `unset`, both as "1,8,64"; elsewhere 1 and 64.
inline std::vector<int64_t> token_counts(const char* unset) {
  if (!is_for_gpu()) return {1, 64};
  const char* list = std::getenv("LIGHTMOE_BENCH_TOKENS");
  std::istringstream text(list != nullptr ? list : unset);
  std::vector<int64_t> counts;
  for (std::string one; std::getline(text, one, ',');) counts.push_back(std::stoll(one));
  return counts;
}

}  // namespace lightmoe::bench
