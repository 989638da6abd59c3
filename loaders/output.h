#pragma once
// Outputs appear complete or not at all. An OutputDirectory is written under a temporary sibling name, then every file and the
// directory are fsynced, a completeness marker (.complete: one line per file with size and XXH3-128) is written last, and the
// directory is renamed into place. A failure or destruction without commit() removes the temporary directory.
// All file writing of the program goes through this header, so that tests can make the n-th write fail or the process stop there.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

namespace lightmoe {

class OutputDirectory {
 public:
  // Refuses, before any work, with Error(kUsage): target exists (unless force), target equal to or inside one of `inputs`
  // (by device and inode), parent missing or not writable. With force the old directory is replaced at commit, not before.
  OutputDirectory(const std::filesystem::path& target, bool force,
                  const std::vector<std::filesystem::path>& inputs = {});
  ~OutputDirectory();
  const std::filesystem::path& path() const { return temporary_; }  // write files here
  void commit();

 private:
  std::filesystem::path target_, temporary_;
  bool force_ = false, committed_ = false;
  int lock_ = -1;
};

// True when the marker is there and every file it lists has its size (and hash, when verify_hashes).
bool is_complete(const std::filesystem::path& directory, bool verify_hashes, std::string* why_not = nullptr);

void write_file_atomically(const std::filesystem::path& path, const std::string& contents);
std::string read_file(const std::filesystem::path& path,
                      int64_t max_bytes);  // regular files only; Error(kInput) past the cap
void copy_file_bytes(const std::filesystem::path& from, const std::filesystem::path& to);
std::string hash_file(const std::filesystem::path& path);  // XXH3-128, 32 hex digits

// Test hook: called before each system write with a running number; may throw, or _exit.
void set_write_fault(std::function<void(int64_t number)> hook);

}  // namespace lightmoe
