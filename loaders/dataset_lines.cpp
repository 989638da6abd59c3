#include "loaders/dataset_lines.h"

#include <algorithm>
#include <cstring>

#include "loaders/json.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {
constexpr size_t kBufferBytes = size_t{1} << 20;
constexpr int64_t kMaxValuesPerLine = 1'000'000;
constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
}  // namespace

LineReader::LineReader(const std::filesystem::path& file, int64_t max_line_bytes)
    : file_(file), max_line_bytes_(max_line_bytes), buffer_(std::min<uint64_t>(kBufferBytes, file_.size())) {
  check(max_line_bytes > 0, ErrorKind::kUsage, "longest line of {} bytes, expected at least 1", max_line_bytes);
  const bool marked = fill() && std::string_view(buffer_.data(), end_).starts_with(kByteOrderMark);
  if (marked) begin_ = kByteOrderMark.size();
}

bool LineReader::fill() {
  const auto bytes = static_cast<size_t>(std::min<uint64_t>(buffer_.size(), file_.size() - next_offset_));
  if (bytes == 0) return false;
  file_.read(next_offset_, buffer_.data(), bytes);
  next_offset_ += bytes;
  begin_ = 0;
  end_ = bytes;
  return true;
}

void LineReader::skip_rest_of_line() {
  inside_long_line_ = false;
  while (begin_ < end_ || fill()) {
    const void* found = std::memchr(buffer_.data() + begin_, '\n', end_ - begin_);
    if (found != nullptr) {
      begin_ = static_cast<size_t>(static_cast<const char*>(found) - buffer_.data()) + 1;
      return;
    }
    begin_ = end_;
  }
}

LineReader::Status LineReader::next(std::string& line) {
  line.clear();
  if (inside_long_line_) skip_rest_of_line();
  if (begin_ == end_ && !fill()) return Status::kEnd;
  ++line_number_;
  const auto cap = static_cast<size_t>(max_line_bytes_);
  while (begin_ < end_ || fill()) {
    const char* from = buffer_.data() + begin_;
    const auto* newline = static_cast<const char*>(std::memchr(from, '\n', end_ - begin_));
    const size_t length = newline != nullptr ? static_cast<size_t>(newline - from) : end_ - begin_;
    if (length > cap - line.size()) {
      inside_long_line_ = true;
      return Status::kTooLong;
    }
    line.append(from, length);
    begin_ += length;
    if (newline == nullptr) continue;
    ++begin_;
    break;
  }
  if (!line.empty() && line.back() == '\r') line.pop_back();
  return Status::kLine;
}

Json parse_json_line(std::string_view text, const std::string& file, int64_t number) {
  JsonLimits limits;
  limits.max_bytes = static_cast<int64_t>(text.size());
  limits.max_values = kMaxValuesPerLine;
  try {
    return parse_json(text, "", limits);
  } catch (const Error& error) {
    // ":1:COLUMN: reason", as the text has no name and is one line.
    const std::string_view message = error.what();
    require(message.starts_with(":1:"), "parse_json: message \"{}\"", message);
    fail(error.kind(), "{}:{}{}", file, number, message.substr(2));
  }
}

}  // namespace lightmoe
