#include "loaders/input_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "runtime/error.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kPieceBytes = int64_t{4} << 20;

const char* kind_of(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
  return "not a regular file";
}

[[noreturn]] void cannot_open(const std::filesystem::path& path, int error) {
  const bool absent = error == ENOENT || error == ENOTDIR || error == ELOOP || error == ENAMETOOLONG || error == ENXIO;
  fail(absent ? ErrorKind::kInput : ErrorKind::kIo, "{}: cannot open: {}", path.string(), std::strerror(error));
}

void require_regular(const std::filesystem::path& path, const struct stat& status) {
  check(S_ISREG(status.st_mode), ErrorKind::kInput, "{}: is {}, expected a regular file", path.string(),
        kind_of(status.st_mode));
}

}  // namespace

InputFile::InputFile(const std::filesystem::path& path) : path_(path) {
  check(path.native().find('\0') == std::string::npos, ErrorKind::kInput, "{}: a file name holds a NUL byte",
        path.c_str());
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) cannot_open(path, errno);
  require_regular(path, status);  // before open: opening a device can have effects
  fd_ = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
  if (fd_ < 0) cannot_open(path, errno);
  try {
    if (::fstat(fd_, &status) != 0) cannot_open(path, errno);
    require_regular(path, status);  // again: the name may point elsewhere by now
  } catch (...) {
    ::close(fd_);
    throw;
  }
  size_ = static_cast<uint64_t>(status.st_size);
}

InputFile::~InputFile() {
  if (fd_ >= 0) ::close(fd_);
}

InputFile::InputFile(InputFile&& other) noexcept : path_(std::move(other.path_)), size_(other.size_), fd_(other.fd_) {
  other.fd_ = -1;
}

void InputFile::read_piece(uint64_t offset, char* out, size_t bytes) const {
  while (bytes > 0) {
    const ssize_t got = ::pread(fd_, out, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    check(got >= 0, ErrorKind::kIo, "{}: reading {} bytes at byte {}: {}", path_.string(), bytes, offset,
          std::strerror(errno));
    check(got > 0, ErrorKind::kIo, "{}: ends at byte {}, had {} bytes when it was opened: the file changed",
          path_.string(), offset, size_);
    offset += static_cast<uint64_t>(got);
    out += got;
    bytes -= static_cast<size_t>(got);
  }
}

void InputFile::read(uint64_t offset, void* out, size_t bytes) const {
  check(offset <= size_ && bytes <= size_ - offset, ErrorKind::kInput, "{}: needs {} bytes from byte {}, has {}",
        path_.string(), bytes, offset, size_);
  char* to = static_cast<char*>(out);
  parallel_for(0, static_cast<int64_t>(bytes), kPieceBytes, [&](int64_t begin, int64_t end) {
    read_piece(offset + static_cast<uint64_t>(begin), to + begin, static_cast<size_t>(end - begin));
  });
}

}  // namespace lightmoe
