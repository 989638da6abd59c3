#pragma once
// A percentage that counts up on one line of stderr; quiet when stderr is no terminal.

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>

namespace lightmoe::cli {

inline std::function<void(int64_t done, int64_t all)> percent_on_terminal(const std::string& what) {
  if (::isatty(STDERR_FILENO) == 0) return {};
  return [what, shown = int64_t{-1}](int64_t done, int64_t all) mutable {
    const int64_t percent = 100 * done / std::max<int64_t>(all, 1);
    if (percent == shown) return;
    shown = percent;
    fmt::print(stderr, "\r{}: {} %{}", what, percent, percent == 100 ? "\n" : "");
  };
}

}  // namespace lightmoe::cli
