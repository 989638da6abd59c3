#include "loaders/hash.h"

#include <fmt/core.h>

#include <algorithm>
#include <vector>

#define XXH_STATIC_LINKING_ONLY  // the state as a plain member
#include <xxhash.h>

#include "loaders/input_file.h"

namespace lightmoe {

struct StreamHash::State {
  XXH3_state_t xxh;
};

StreamHash::StreamHash() : state_(std::make_unique<State>()) { XXH3_128bits_reset(&state_->xxh); }
StreamHash::~StreamHash() = default;
void StreamHash::update(const void* data, size_t bytes) {
  if (bytes > 0) XXH3_128bits_update(&state_->xxh, data, bytes);
}
std::string StreamHash::digest() const {
  const XXH128_hash_t hash = XXH3_128bits_digest(&state_->xxh);
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

std::string hash_file(const std::filesystem::path& path) {
  constexpr uint64_t kPieceBytes = uint64_t{8} << 20;
  const InputFile file(path);
  StreamHash hash;
  std::vector<char> piece(std::min(kPieceBytes, file.size()));
  for (uint64_t done = 0; done < file.size(); done += piece.size()) {
    piece.resize(std::min(kPieceBytes, file.size() - done));
    file.read(done, piece.data(), piece.size());
    hash.update(piece.data(), piece.size());
  }
  return hash.digest();
}

}  // namespace lightmoe
