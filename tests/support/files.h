#pragma once
// Files for tests: a directory that goes away, raw safetensors bytes made by hand, and the error an action ends in.

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <string>

#include "runtime/error.h"

namespace lightmoe::testing {

// A fresh directory, in memory (/dev/shm) where there is room, removed at the end of the scope.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

// build/plugins/NAME.so, from tests/plugins/NAME.c.
std::string plugin_path(const std::string& name);

// Plain writes, without the program's own output layer.
void put_file(const std::filesystem::path& path, const std::string& bytes);
std::string get_file(const std::filesystem::path& path);
// Length prefix, header text, data.
std::string safetensors_bytes(const std::string& header, const std::string& data);

// The Error that `action` throws must be of this kind and name every one of the pieces.
::testing::AssertionResult fails_with(ErrorKind kind, const std::vector<std::string>& pieces,
                                      const std::function<void()>& action);

// Runs `body` in a forked process on one thread and returns its exit code, or -signal. What it throws ends it with code 99.
int in_child(const std::function<int()>& body);
// For in_child: the address space may grow by this much from now on, so that a reader that believes a lying size fails.
void cap_memory_growth(int64_t bytes);

}  // namespace lightmoe::testing
