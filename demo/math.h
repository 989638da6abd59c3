#pragma once
// "47+85=" -> "132", "85-47=" -> "38": all pairs of two-digit numbers, zero padded; sums have three digits.

#include <string>

#include "demo/task.h"

namespace lightmoe::demo {

inline std::string padded(int value, size_t digits) {
  const std::string text = std::to_string(value);
  return std::string(digits - text.size(), '0') + text;
}

inline Task math_task(uint64_t seed) {
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
  shuffle(task.train, rng), shuffle(task.validation, rng), shuffle(task.test, rng);
  return task;
}

}  // namespace lightmoe::demo
