#include "loaders/output.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#include "loaders/input_file.h"
#include "loaders/marker.h"
#include "loaders/output_internal.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr size_t kPieceBytes = size_t{8} << 20;

std::function<void(int64_t)> write_fault;
int64_t write_number = 0;

}  // namespace

void set_write_fault(std::function<void(int64_t number)> hook) {
  write_fault = std::move(hook);
  write_number = 0;
}

void before_write() {
  if (write_fault) write_fault(++write_number);
}

uint64_t free_bytes(const std::filesystem::path& directory) {
  struct statvfs status {};
  if (::statvfs(directory.c_str(), &status) != 0) return 0;
  return static_cast<uint64_t>(status.f_bavail) * status.f_frsize;
}

void sync_directory(const std::filesystem::path& directory) {
  before_write();
  const int fd = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  check(fd >= 0, ErrorKind::kIo, "{}: cannot open to sync: {}", directory.string(), std::strerror(errno));
  const int result = ::fsync(fd), error = errno;
  ::close(fd);
  // Some network file systems cannot sync a directory; the rename stands all the same.
  check(result == 0 || error == EINVAL || error == ENOTSUP, ErrorKind::kIo, "{}: fsync: {}", directory.string(),
        std::strerror(error));
}

void rename_path(const std::filesystem::path& from, const std::filesystem::path& to) {
  before_write();
  check(::rename(from.c_str(), to.c_str()) == 0, ErrorKind::kIo, "{}: cannot rename to {}: {}", from.string(),
        to.string(), std::strerror(errno));
}

OutputFile::OutputFile(const std::filesystem::path& path, Mode mode) : path_(path) {
  // Past a file size limit the system would kill the process; with the signal ignored, write reports EFBIG.
  static const bool ignored = [] {
    struct sigaction action {};
    if (::sigaction(SIGXFSZ, nullptr, &action) == 0 && action.sa_handler == SIG_DFL) ::signal(SIGXFSZ, SIG_IGN);
    return true;
  }();
  static_cast<void>(ignored);
  before_write();
  const int flags = O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW | (mode == Mode::kCreate ? O_EXCL : O_APPEND);
  if (mode == Mode::kCreate) hash_ = std::make_unique<StreamHash>();
  fd_ = ::open(path.c_str(), flags, 0644);
  check(fd_ >= 0, ErrorKind::kIo, "{}: cannot create: {}", path.string(), std::strerror(errno));
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) ::close(fd_);
}

void OutputFile::write(const void* data, size_t bytes) {
  require(fd_ >= 0, "{}: written after close", path_.string());
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    before_write();
    const ssize_t done = ::write(fd_, from, std::min(bytes, kPieceBytes));
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) {
      const int error = errno;
      fail(ErrorKind::kIo, "{}: cannot write {} bytes after the first {}: {} ({} bytes free there)", path_.string(),
           bytes, written_, std::strerror(error), free_bytes(path_.parent_path().empty() ? "." : path_.parent_path()));
    }
    if (hash_) hash_->update(from, static_cast<size_t>(done));
    from += done;
    bytes -= static_cast<size_t>(done);
    written_ += static_cast<uint64_t>(done);
  }
}

void OutputFile::sync() {
  before_write();
  check(::fsync(fd_) == 0, ErrorKind::kIo, "{}: fsync after {} bytes: {}", path_.string(), written_,
        std::strerror(errno));
}

void OutputFile::close() {
  if (fd_ < 0) return;
  sync();
  if (hash_) remember_written_hash(fd_, hash_->digest());
  const int fd = fd_;
  fd_ = -1;
  check(::close(fd) == 0, ErrorKind::kIo, "{}: close: {}", path_.string(), std::strerror(errno));
}

void write_file_atomically(const std::filesystem::path& path, const std::function<void(OutputFile&)>& write) {
  const std::filesystem::path directory = path.parent_path().empty() ? "." : path.parent_path();
  const std::filesystem::path temporary =
      directory / fmt::format(".{}.partial-{}", path.filename().string(), ::getpid());
  ::unlink(temporary.c_str());  // of a killed process that had our number
  try {
    OutputFile file(temporary);
    write(file);
    file.close();
    rename_path(temporary, path);
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  sync_directory(directory);
}

void write_file_atomically(const std::filesystem::path& path, std::string_view contents) {
  write_file_atomically(path, [&](OutputFile& file) { file.write(contents); });
}

std::string read_file(const std::filesystem::path& path, int64_t max_bytes) {
  const InputFile file(path);
  check(file.size() <= static_cast<uint64_t>(max_bytes), ErrorKind::kInput, "{}: {} bytes, at most {} accepted",
        path.string(), file.size(), max_bytes);
  std::string contents(file.size(), '\0');
  file.read(0, contents.data(), contents.size());
  return contents;
}

void copy_file_bytes(const std::filesystem::path& from, const std::filesystem::path& to) {
  const InputFile input(from);
  OutputFile output(to);
  std::string piece;
  for (uint64_t done = 0; done < input.size(); done += piece.size()) {
    piece.resize(std::min<uint64_t>(kPieceBytes, input.size() - done));
    input.read(done, piece.data(), piece.size());
    output.write(piece);
  }
  output.close();
}

}  // namespace lightmoe
