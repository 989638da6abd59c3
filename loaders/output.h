#pragma once
// Outputs appear complete or not at all. An OutputDirectory is written under a temporary sibling name, then every file and the
// directory are fsynced, a completeness marker (loaders/marker.h) is written last, and the directory is renamed into place. A
// failure or destruction without commit() removes the temporary directory; what a killed process left behind is removed (or, in
// the middle of a replacement, put back) by the next one that writes the same target.
// All file writing of the program goes through this header, so that tests can make the n-th write fail or the process stop there.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "loaders/hash.h"

namespace lightmoe {

class OutputDirectory {
 public:
  // Refuses, before any work, with Error(kUsage): target exists (unless force), target equal to, inside or around one of `inputs`
  // (by device and inode), parent missing or not writable, another process writing the same target. With force the old
  // directory is replaced at commit, not before, and only if it is empty or was written by this class (it has a marker).
  OutputDirectory(const std::filesystem::path& target, bool force,
                  const std::vector<std::filesystem::path>& inputs = {});
  ~OutputDirectory();
  OutputDirectory(const OutputDirectory&) = delete;
  OutputDirectory& operator=(const OutputDirectory&) = delete;
  const std::filesystem::path& path() const { return temporary_; }  // write files here
  const std::filesystem::path& target() const { return target_; }
  void commit();

 private:
  void release() noexcept;
  std::filesystem::path target_, temporary_, lock_path_;
  bool force_ = false, committed_ = false;
  int lock_ = -1;
};

// One file being written; the only place that calls write(2). Errors are Error(kIo) naming the file, the bytes and the free space.
class OutputFile {
 public:
  enum class Mode : uint8_t { kCreate, kAppend };  // kCreate: the file must not exist
  explicit OutputFile(const std::filesystem::path& path, Mode mode = Mode::kCreate);
  ~OutputFile();  // closes without a promise; call close() to know
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  void write(const void* data, size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void sync();   // fsync
  void close();  // sync, then close
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  uint64_t written_ = 0;
  std::unique_ptr<StreamHash> hash_;  // of a new file
  int fd_ = -1;
};

// True when the marker is there and every file it lists has its size (and hash, when verify_hashes).
bool is_complete(const std::filesystem::path& directory, bool verify_hashes, std::string* why_not = nullptr);

// Temporary sibling, fsync, rename over the old file, fsync of the directory.
void write_file_atomically(const std::filesystem::path& path, std::string_view contents);
// `write` fills the temporary sibling; nothing is left of it when write throws.
void write_file_atomically(const std::filesystem::path& path, const std::function<void(OutputFile&)>& write);
std::string read_file(const std::filesystem::path& path,
                      int64_t max_bytes);  // regular files only; Error(kInput) past the cap
void copy_file_bytes(const std::filesystem::path& from, const std::filesystem::path& to);
uint64_t free_bytes(const std::filesystem::path& directory);  // that this user may fill; 0 where unknown

// Test hook: called before each system call that changes the file system (create, write, sync, rename, remove) with a running
// number from 1; may throw, or _exit. An empty function takes it away.
void set_write_fault(std::function<void(int64_t number)> hook);

}  // namespace lightmoe
