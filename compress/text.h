#pragma once
// Lists in messages. NOTE: fmt::join in one format call with other arguments makes g++ 12 warn at -O3 (stringop-overflow).

#include <string>

namespace lightmoe {

template <class Values>
std::string joined(const Values& values, const char* separator = " ") {
  std::string text;
  for (const auto& value : values) {
    if (!text.empty()) text += separator;
    text += std::to_string(value);
  }
  return text;
}

}  // namespace lightmoe
