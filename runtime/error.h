#pragma once
// One exception type for everything a user can cause or meet. The message carries the values:
// file, tensor, expected and actual, and a hint. Programs print it on one line and exit with
// exit_code(). Checks stand once, at the door of an op or a file; inside, trust.

#ifdef __CUDACC__
#define FMT_USE_CONSTEXPR 1  // fmt 9 does not trust nvcc with constexpr, yet keeps the consteval that needs it
#endif
#include <fmt/core.h>

#include <stdexcept>
#include <string>
#include <string_view>

namespace lightmoe {

// Documented in README.md ("Exit codes"); the values are part of the program's interface.
enum class ErrorKind {
  kInternal = 1,  // a broken invariant of this program
  kUsage = 2,     // flags, configuration, output path
  kInput = 3,     // model, tokenizer or data file
  kIo = 4,        // disk full, permission, device error
  kMemory = 5,    // host or device memory
  kNumeric = 6,   // NaN, infinity, divergence
  kResume = 7,    // incompatible or corrupt checkpoint to resume from
  kDevice = 9,    // GPU, driver or plug-in
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }
  int exit_code() const { return static_cast<int>(kind_); }

 private:
  ErrorKind kind_;
};

// Formats and throws, out of line: what includes this header compiles no formatting.
[[noreturn]] void throw_error(ErrorKind kind, fmt::string_view format, fmt::format_args values);

template <class... Args>
[[noreturn]] void fail(ErrorKind kind, fmt::format_string<Args...> format, Args&&... args) {
  throw_error(kind, format, fmt::make_format_args(args...));
}

// check(ok, kind, "format", values...): throws when ok is false.
template <class... Args>
void check(bool ok, ErrorKind kind, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok) throw_error(kind, format, fmt::make_format_args(args...));
}

// For op arguments: a violation is this program's own fault.
template <class... Args>
void require(bool ok, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok) throw_error(ErrorKind::kInternal, format, fmt::make_format_args(args...));
}

// Text out of a file made fit for a one-line message: control and non-ASCII bytes as \xNN, long text cut in the middle.
std::string printable(std::string_view text, size_t max_length = 200);

}  // namespace lightmoe
