#pragma once
// A regular file opened read-only for positioned reads. Nothing else is ever opened: a FIFO, device, socket or directory in the
// place of a file is refused by name, without blocking. No mmap: a file that shrinks is an error, not SIGBUS.
// Missing or not a regular file: Error(kInput). Permission and device errors: Error(kIo).

#include <cstdint>
#include <filesystem>

namespace lightmoe {

class InputFile {
 public:
  explicit InputFile(const std::filesystem::path& path);
  ~InputFile();
  InputFile(InputFile&& other) noexcept;
  InputFile& operator=(InputFile&&) = delete;

  const std::filesystem::path& path() const { return path_; }
  uint64_t size() const { return size_; }  // when it was opened
  // Exactly `bytes` bytes from `offset`, or an Error. Large reads go in parallel pieces.
  void read(uint64_t offset, void* out, size_t bytes) const;

 private:
  void read_piece(uint64_t offset, char* out, size_t bytes) const;
  std::filesystem::path path_;
  uint64_t size_ = 0;
  int fd_ = -1;
};

}  // namespace lightmoe
