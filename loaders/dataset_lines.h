#pragma once
// The lines of a regular file, one by one, in bounded memory. LF and CRLF end a line, the last one may lack its end; a byte
// order mark at the start is skipped. Errors of opening and reading as in InputFile.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "loaders/input_file.h"
#include "loaders/json_type.h"

namespace lightmoe {

class LineReader {
 public:
  LineReader(const std::filesystem::path& file, int64_t max_line_bytes);

  enum class Status : uint8_t { kLine, kTooLong, kEnd };
  // kTooLong: `line` holds what was read of it; the next call goes on after its end.
  Status next(std::string& line);
  int64_t line_number() const { return line_number_; }  // of the last line returned, from 1
  const std::filesystem::path& path() const { return file_.path(); }
  int64_t max_line_bytes() const { return max_line_bytes_; }

 private:
  bool fill();
  void skip_rest_of_line();

  InputFile file_;
  int64_t max_line_bytes_, line_number_ = 0;
  bool inside_long_line_ = false;
  uint64_t next_offset_ = 0;  // of the file, after the buffer
  std::vector<char> buffer_;
  size_t begin_ = 0, end_ = 0;  // unread part of the buffer
};

// One line of JSON; errors are Error(kInput) "file:number:column: reason".
Json parse_json_line(std::string_view text, const std::string& file, int64_t number);

}  // namespace lightmoe
