#pragma once
// XXH3-128 of a stream of bytes, as 32 hex digits. Against accidents, not against an adversary.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

namespace lightmoe {

class StreamHash {
 public:
  StreamHash();
  ~StreamHash();
  void update(const void* data, size_t bytes);
  std::string digest() const;  // of everything so far

 private:
  struct State;
  std::unique_ptr<State> state_;
};

std::string hash_file(const std::filesystem::path& path);

}  // namespace lightmoe
