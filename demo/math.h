#pragma once
// "47+85=" -> "132", "85-47=" -> "38": all pairs of two-digit numbers, zero padded; sums have three digits.
// "47+85+06=" -> "138": some of the sums of three.

#include <set>
#include <string>

#include "demo/task.h"

namespace lightmoe::demo {

inline std::string padded(int value, size_t digits) {
  const std::string text = std::to_string(value);
  return std::string(digits - text.size(), '0') + text;
}

inline Task math_task(uint64_t seed, size_t num_triples) {
  Task task{.name = "math"};
  for (int a = 0; a < 100; ++a) {
    for (int b = 0; b < 100; ++b) {
      const std::string sum = padded(a, 2) + "+" + padded(b, 2) + "=",
                        difference = padded(a, 2) + "-" + padded(b, 2) + "=";
      task.of(split_of(sum)).push_back({sum, padded(a + b, 3)});
      if (a >= b) task.of(split_of(difference)).push_back({difference, padded(a - b, 2)});
    }
  }
  Philox rng(seed, kMath);
  for (std::set<std::string> seen; seen.size() < num_triples;) {
    const int a = static_cast<int>(rng.below(100)), b = static_cast<int>(rng.below(100)),
              c = static_cast<int>(rng.below(100));
    const std::string sum = padded(a, 2) + "+" + padded(b, 2) + "+" + padded(c, 2) + "=";
    if (seen.insert(sum).second) task.of(split_of(sum)).push_back({sum, padded(a + b + c, 3)});
  }
  shuffle(task.train, rng), shuffle(task.validation, rng), shuffle(task.test, rng);
  return task;
}

}  // namespace lightmoe::demo
