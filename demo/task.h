#pragma once
// What the demo's generators share: examples, splits by hash of a key, deterministic choice.

#include <xxhash.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/philox.h"

namespace lightmoe::demo {

struct Example {
  std::string prompt, completion;
  std::vector<std::string> choices;  // multiple choice form when not empty
  int64_t answer = -1;
};

enum class Split : uint8_t { kTrain, kValidation, kTest };
// 5 % of keys are validation, 15 % test; a key's split is the same in every run and every file.
inline Split split_of(std::string_view key) {
  const uint64_t bucket = XXH3_64bits(key.data(), key.size()) % 20;
  return bucket == 0 ? Split::kValidation : bucket <= 3 ? Split::kTest : Split::kTrain;
}

struct Task {
  std::string name;
  std::vector<Example> train, validation, test;

  std::vector<Example>& of(Split split) {
    return split == Split::kTrain ? train : split == Split::kValidation ? validation : test;
  }
};

// Streams of random numbers, one per generator, so that changing one leaves the others' data alone.
enum Stream : uint64_t { kMath = 1, kCode, kRecall, kIntent, kTranslation, kText, kMix };

template <class T>
const T& pick(const std::vector<T>& items, Philox& rng) {
  return items[rng.below(items.size())];
}
template <class T>
void shuffle(std::vector<T>& items, Philox& rng) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[rng.below(i)]);
}
template <class T>
void keep_first(std::vector<T>& items, size_t count) {
  if (items.size() > count) items.resize(count);
}

}  // namespace lightmoe::demo
