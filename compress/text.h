#pragma once
// Lists, counts and sizes in messages. NOTE: fmt::join in one format call with other arguments makes g++ 12 warn at -O3 (stringop-overflow).

#include <fmt/core.h>

#include <cstdint>
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

inline std::string human_count(int64_t count) {  // "6.92 B", "3.69 M"
  const auto n = static_cast<double>(count);
  if (count >= 1'000'000'000) return fmt::format("{:.3f} B", n * 1e-9);
  if (count >= 1'000'000) return fmt::format("{:.3f} M", n * 1e-6);
  return fmt::format("{:.1f} k", n * 1e-3);
}
inline std::string human_bytes(int64_t bytes) {  // "12.89 GiB", "7.04 MiB"
  const auto n = static_cast<double>(bytes);
  if (bytes >= int64_t{1} << 30) return fmt::format("{:.2f} GiB", n * 0x1p-30);
  return fmt::format("{:.2f} MiB", n * 0x1p-20);
}

}  // namespace lightmoe
