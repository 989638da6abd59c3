#pragma once
// ">>> sorted([3,1,2])\n" -> "[1,2,3]": what a line of Python over a list of 2 to 6 digits evaluates to. Lists are written
// without spaces, which Python's own prompt would add.

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "demo/task.h"

namespace lightmoe::demo {

inline Example code_example(Philox& rng) {
  std::vector<int> list(2 + rng.below(5));
  for (int& digit : list) digit = static_cast<int>(rng.below(10));
  const auto show = [](const std::vector<int>& digits) {
    std::string text;
    for (int digit : digits) text += (text.empty() ? "" : ",") + std::to_string(digit);
    return "[" + text + "]";
  };
  const std::string l = show(list);
  const int chosen = pick(list, rng);
  const auto example = [](const std::string& expression, const std::string& value) {
    return Example{.prompt = ">>> " + expression + "\n", .completion = value};
  };
  std::vector<int> other = list;
  switch (rng.below(8)) {
    case 0:
      std::sort(other.begin(), other.end());
      return example(fmt::format("sorted({})", l), show(other));
    case 1:
      std::reverse(other.begin(), other.end());
      return example(l + "[::-1]", show(other));
    case 2:
      return example(fmt::format("max({})", l), fmt::to_string(*std::max_element(list.begin(), list.end())));
    case 3:
      return example(fmt::format("min({})", l), fmt::to_string(*std::min_element(list.begin(), list.end())));
    case 4:
      return example(fmt::format("sum({})", l), fmt::to_string(std::accumulate(list.begin(), list.end(), 0)));
    case 5:
      return example(fmt::format("len({})", l), fmt::to_string(list.size()));
    case 6:
      return example(fmt::format("{}.count({})", l, chosen),
                     fmt::to_string(std::count(list.begin(), list.end(), chosen)));
    default:
      return example(fmt::format("{}.index({})", l, chosen),
                     fmt::to_string(std::find(list.begin(), list.end(), chosen) - list.begin()));
  }
}

// Distinct prompts until the training split has num_train of them.
inline Task code_task(uint64_t seed, size_t num_train) {
  Task task{.name = "code"};
  Philox rng(seed, kCode);
  std::set<std::string> seen;
  while (task.train.size() < num_train) {
    const Example example = code_example(rng);
    if (seen.insert(example.prompt).second) task.of(split_of(example.prompt)).push_back(example);
  }
  return task;
}

}  // namespace lightmoe::demo
