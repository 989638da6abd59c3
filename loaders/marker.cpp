#include "loaders/marker.h"

#include <fmt/core.h>
#include <sys/stat.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string_view>

#include "loaders/output.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr int64_t kMaxMarkerBytes = int64_t{16} << 20;

std::string last_line(size_t files) { return fmt::format("{} files\n", files); }

// False when the line is anything else, or a name leads out of the directory.
bool parse_line(const std::string& line, MarkerEntry* out) {
  const size_t first = line.find(' '), second = line.find(' ', first == std::string::npos ? first : first + 1);
  if (first != 32 || second == std::string::npos || second == first + 1 || second - first > 20) return false;
  out->hash = line.substr(0, first);
  out->name = line.substr(second + 1);
  for (size_t i = first + 1; i < second; ++i) {
    if (line[i] < '0' || line[i] > '9') return false;
    out->size = out->size * 10 + static_cast<uint64_t>(line[i] - '0');
  }
  const std::filesystem::path path(out->name);
  if (out->name.empty() || out->name.find('\0') != std::string::npos || path.is_absolute()) return false;
  return std::none_of(path.begin(), path.end(), [](const std::filesystem::path& part) { return part == ".."; });
}

struct Written {
  int64_t size, seconds, nanoseconds;
  std::string hash;
};
std::mutex written_mutex;
std::map<std::pair<dev_t, ino_t>, Written>& written() {
  static std::map<std::pair<dev_t, ino_t>, Written> table;
  return table;
}

}  // namespace

std::vector<MarkerEntry> read_marker(const std::filesystem::path& directory) {
  const std::filesystem::path marker = directory / kMarkerName;
  const std::string text = read_file(marker, kMaxMarkerBytes);
  std::vector<MarkerEntry> entries;
  size_t begin = 0;
  while (begin < text.size() && std::string_view(text).substr(begin) != last_line(entries.size())) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    MarkerEntry entry;
    check(parse_line(text.substr(begin, end - begin), &entry), ErrorKind::kInput, "{}: bad line {}", marker.string(),
          entries.size() + 1);
    entries.push_back(std::move(entry));
    begin = end + 1;
  }
  check(begin < text.size(), ErrorKind::kInput, "{}: cut after {} lines", marker.string(), entries.size());
  return entries;
}

std::string marker_text(const std::vector<MarkerEntry>& entries) {
  std::string text;
  for (const MarkerEntry& entry : entries) text += fmt::format("{} {} {}\n", entry.hash, entry.size, entry.name);
  return text + last_line(entries.size());
}

void remember_written_hash(int fd, const std::string& hash) {
  struct stat s {};
  if (::fstat(fd, &s) != 0) return;
  const std::lock_guard<std::mutex> lock(written_mutex);
  written()[{s.st_dev, s.st_ino}] = {s.st_size, s.st_mtim.tv_sec, s.st_mtim.tv_nsec, hash};
}

std::string take_written_hash(const std::filesystem::path& path) {
  struct stat s {};
  if (::stat(path.c_str(), &s) != 0) return "";
  const std::lock_guard<std::mutex> lock(written_mutex);
  const auto found = written().find({s.st_dev, s.st_ino});
  if (found == written().end()) return "";
  const Written entry = std::move(found->second);
  written().erase(found);
  const bool same =
      entry.size == s.st_size && entry.seconds == s.st_mtim.tv_sec && entry.nanoseconds == s.st_mtim.tv_nsec;
  return same ? entry.hash : "";
}

}  // namespace lightmoe
