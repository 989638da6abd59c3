// OutputDirectory: who may write where, the lock, the publish, and the completeness marker.

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "loaders/input_file.h"
#include "loaders/marker.h"
#include "loaders/output.h"
#include "loaders/output_internal.h"
#include "runtime/error.h"

namespace fs = std::filesystem;

namespace lightmoe {
namespace {

bool is_there(const fs::path& path) {
  struct stat status {};
  return ::lstat(path.c_str(), &status) == 0;
}

bool same_file(const fs::path& a, const fs::path& b) {
  struct stat x {
  }, y{};
  return ::stat(a.c_str(), &x) == 0 && ::stat(b.c_str(), &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

// Is `outer` the same as `path` or one of the directories above it?
bool contains(const fs::path& outer, fs::path path) {
  for (;; path = path.parent_path()) {
    if (same_file(outer, path)) return true;
    if (path == path.parent_path()) return false;
  }
}

fs::path resolved(const fs::path& target) {
  std::error_code ignored;
  fs::path path = fs::absolute(target).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();  // "out/"
  const fs::path whole = fs::canonical(path, ignored);
  if (!ignored) return whole;
  const fs::path parent = fs::canonical(path.parent_path(), ignored);
  check(!ignored, ErrorKind::kUsage, "{}: the directory {} does not exist; create it first", target.string(),
        path.parent_path().string());
  return parent / path.filename();
}

void refuse_inputs(const fs::path& target, const std::vector<fs::path>& inputs) {
  for (const fs::path& input : inputs) {
    std::error_code error;
    const fs::path real = fs::canonical(input, error);
    if (error) continue;  // a missing input is reported by its reader
    check(!contains(real, target), ErrorKind::kUsage, "{}: the output is {} the input {}; choose another place",
          target.string(), same_file(real, target) ? "the same as" : "inside", input.string());
    check(!contains(target, real), ErrorKind::kUsage,
          "{}: the output would replace a directory that holds the input {}", target.string(), input.string());
  }
}

void refuse_occupied(const fs::path& target, bool force) {
  if (!is_there(target)) return;
  check(force, ErrorKind::kUsage, "{}: exists; choose another place, or --force to replace it", target.string());
  check(fs::is_directory(target), ErrorKind::kUsage, "{}: is not a directory; it is not replaced", target.string());
  check(fs::is_empty(target) || is_there(target / kMarkerName), ErrorKind::kUsage,
        "{}: holds files that this program did not write (no {}); it is not replaced, not even with --force",
        target.string(), kMarkerName);
}

// Exclusive lock on a sibling file. The file is removed by its holder, so a lock counts only while the name still leads to it.
int lock_target(const fs::path& lock_path, const fs::path& target) {
  for (;;) {
    const int fd = ::open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    check(fd >= 0, ErrorKind::kUsage, "{}: cannot write in {}: {}", target.string(), target.parent_path().string(),
          std::strerror(errno));
    struct stat held {
    }, named{};
    if (::flock(fd, LOCK_EX | LOCK_NB) == 0) {
      if (::fstat(fd, &held) == 0 && ::stat(lock_path.c_str(), &named) == 0 && held.st_ino == named.st_ino) {
        char host[256] = "?";
        ::gethostname(host, sizeof host - 1);
        const std::string owner = fmt::format("process {} on {}", ::getpid(), host);
        if (::ftruncate(fd, 0) == 0 && ::pwrite(fd, owner.data(), owner.size(), 0) > 0) return fd;
        return fd;  // the text is for people only
      }
      ::close(fd);
      continue;
    }
    const int error = errno;
    char owner[300] = {};
    if (::pread(fd, owner, sizeof owner - 1, 0) <= 0) std::strcpy(owner, "another process");
    ::close(fd);
    check(error == EWOULDBLOCK, ErrorKind::kIo, "{}: cannot lock: {}", lock_path.string(), std::strerror(error));
    fail(ErrorKind::kUsage, "{}: {} is writing it now", target.string(), owner);
  }
}

void remove_tree(const fs::path& path) {
  if (!is_there(path)) return;
  before_write();
  std::error_code error;
  fs::remove_all(path, error);
  check(!error, ErrorKind::kIo, "{}: cannot remove: {}", path.string(), error.message());
}

fs::path hidden_sibling(const fs::path& target, const char* suffix) {
  return target.parent_path() / fmt::format(".{}.{}", target.filename().string(), suffix);
}

std::vector<fs::path> files_under(const fs::path& directory) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    if (entry.is_directory()) continue;
    require(entry.is_regular_file() && !entry.is_symlink(), "{}: neither a file nor a directory in an output",
            entry.path().string());
    files.push_back(entry.path().lexically_relative(directory));
  }
  std::sort(files.begin(), files.end());
  return files;
}

void sync_file(const fs::path& path) {
  before_write();
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  check(fd >= 0, ErrorKind::kIo, "{}: cannot open to sync: {}", path.string(), std::strerror(errno));
  const int result = ::fsync(fd), error = errno;
  ::close(fd);
  check(result == 0, ErrorKind::kIo, "{}: fsync: {}", path.string(), std::strerror(error));
}

void sync_tree(const fs::path& directory) {
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    entry.is_directory() ? sync_directory(entry.path()) : sync_file(entry.path());
  }
  sync_directory(directory);
}

void write_marker(const fs::path& directory) {
  std::vector<MarkerEntry> entries;
  for (const fs::path& file : files_under(directory)) {
    require(file.native().find('\n') == std::string::npos, "{}: a line break in an output file name", file.string());
    const std::string known = take_written_hash(directory / file);
    entries.push_back(
        {known.empty() ? hash_file(directory / file) : known, file.string(), fs::file_size(directory / file)});
  }
  write_file_atomically(directory / kMarkerName, marker_text(entries));
}

}  // namespace

OutputDirectory::OutputDirectory(const fs::path& target, bool force, const std::vector<fs::path>& inputs)
    : target_(resolved(target)), force_(force) {
  refuse_inputs(target_, inputs);
  temporary_ = hidden_sibling(target_, "partial");
  lock_path_ = hidden_sibling(target_, "lock");
  refuse_occupied(target_, force);  // before the lock too: a refusal leaves no trace
  lock_ = lock_target(lock_path_, target_);
  try {
    const fs::path old = hidden_sibling(target_, "old");
    if (is_there(old) && !is_there(target_)) rename_path(old, target_);  // killed between the two renames of commit
    remove_tree(old);
    remove_tree(temporary_);
    refuse_occupied(target_, force);
    before_write();
    check(::mkdir(temporary_.c_str(), 0755) == 0, ErrorKind::kUsage, "{}: cannot write in {}: {}", target_.string(),
          target_.parent_path().string(), std::strerror(errno));
  } catch (...) {
    release();
    throw;
  }
}

OutputDirectory::~OutputDirectory() {
  std::error_code ignored;
  fs::remove_all(temporary_, ignored);  // unfinished, or after a failed commit the old directory that was swapped out
  release();
}

void OutputDirectory::release() noexcept {
  if (lock_ < 0) return;
  ::unlink(lock_path_.c_str());
  ::close(lock_);
  lock_ = -1;
}

void OutputDirectory::commit() {
  require(!committed_, "{}: committed twice", target_.string());
  sync_tree(temporary_);
  write_marker(temporary_);
  const fs::path parent = target_.parent_path(), old = hidden_sibling(target_, "old");
  if (is_there(target_)) {
    refuse_occupied(target_, force_);
    before_write();
    if (::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, target_.c_str(), RENAME_EXCHANGE) != 0) {
      rename_path(target_, old);  // where the file system cannot exchange; the constructor repairs a stop in between
      rename_path(temporary_, target_);
    }
  } else {
    rename_path(temporary_, target_);
  }
  committed_ = true;
  sync_directory(parent);
  remove_tree(temporary_);  // the old directory, after an exchange
  remove_tree(old);
}

bool is_complete(const fs::path& directory, bool verify_hashes, std::string* why_not) {
  try {
    for (const MarkerEntry& entry : read_marker(directory)) {
      const fs::path file = directory / entry.name;
      const uint64_t size = InputFile(file).size();
      check(size == entry.size, ErrorKind::kInput, "{}: {} bytes, {} when written", file.string(), size, entry.size);
      check(!verify_hashes || hash_file(file) == entry.hash, ErrorKind::kInput,
            "{}: contents changed since written (XXH3-128)", file.string());
    }
  } catch (const Error& error) {
    if (why_not) *why_not = error.what();
    return false;
  }
  return true;
}

}  // namespace lightmoe
