#pragma once
// The completeness marker of a published directory, .complete: one line "XXH3-128 SIZE NAME" per file, then "N files", so that
// a cut marker is noticed. Names are relative and stay in the directory.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace lightmoe {

inline constexpr const char* kMarkerName = ".complete";

struct MarkerEntry {
  std::string hash, name;
  uint64_t size = 0;
};
// Error(kInput) naming the marker and the line.
std::vector<MarkerEntry> read_marker(const std::filesystem::path& directory);
std::string marker_text(const std::vector<MarkerEntry>& entries);

// Hashes that OutputFile made while writing, by inode: sealing a directory need not read its files again. A file that was
// touched since is not found.
void remember_written_hash(int fd, const std::string& hash);
std::string take_written_hash(const std::filesystem::path& path);  // "" when unknown

}  // namespace lightmoe
