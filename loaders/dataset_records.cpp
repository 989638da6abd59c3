#include <algorithm>
#include <string_view>

#include "loaders/dataset.h"
#include "loaders/dataset_lines.h"
#include "loaders/json.h"
#include "loaders/tokenizer_text.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr size_t kMaxProblems = 5;

enum class Role : uint8_t { kSystem, kUser, kAssistant };

// One line of JSON on its way to a record: knows where it stands, for messages.
class Line {
 public:
  Line(const std::string& file, int64_t number, std::string_view text) : file_(file), number_(number), text_(text) {
    json_ = parse_json_line(text, file, number);
    check(json_.is_object(), ErrorKind::kInput, "{}:{}:1: is {}, expected an object", file_, number_,
          json_.type_name());
  }

  [[noreturn]] void refuse(const char* key, const std::string& reason) const {
    fail(ErrorKind::kInput, "{}:{}:{}: {}", file_, number_, column_of(key), reason);
  }
  bool has(const char* key) const { return json_.contains(key) && !json_.at(key).is_null(); }
  const Json& at(const char* key) const {
    if (!has(key)) refuse(key, fmt::format("key \"{}\" is missing", key));
    return json_.at(key);
  }
  std::string string(const char* key) const { return string_in(key, at(key), fmt::format("\"{}\"", key)); }
  std::string string_in(const char* key, const Json& value, const std::string& what) const {
    if (!value.is_string()) refuse(key, fmt::format("{} is {}, expected a string", what, value.type_name()));
    return value.get<std::string>();
  }
  const Json& array(const char* key) const {
    const Json& value = at(key);
    if (!value.is_array()) refuse(key, fmt::format("\"{}\" is {}, expected an array", key, value.type_name()));
    if (value.empty()) refuse(key, fmt::format("\"{}\" is empty", key));
    return value;
  }
  int64_t number() const { return number_; }

 private:
  // Column of `"key"` before a colon; 1 when the line has none.
  size_t column_of(std::string_view key) const {
    if (key.empty()) return 1;
    const std::string quoted = fmt::format("\"{}\"", key);
    for (size_t at = text_.find(quoted); at != std::string_view::npos; at = text_.find(quoted, at + 1)) {
      const size_t next = text_.find_first_not_of(" \t", at + quoted.size());
      if (next != std::string_view::npos && text_[next] == ':') return at + 1;
    }
    return 1;
  }

  const std::string& file_;
  int64_t number_;
  std::string_view text_;
  Json json_;
};

Role role_of(const Line& line, const char* key, const std::string& role) {
  if (role == "system") return Role::kSystem;
  if (role == "user" || role == "human") return Role::kUser;
  if (role == "assistant" || role == "gpt") return Role::kAssistant;
  line.refuse(key, fmt::format("role \"{}\", expected system, user (human) or assistant (gpt)", printable(role, 40)));
}

// Text without loss joins the part before it when that has none either.
void add_prompt(TextRecord& record, const std::string& text) {
  const bool joins = !record.parts.empty() && !record.parts.back().loss;
  if (joins)
    record.parts.back().text += text;
  else
    record.parts.push_back({text, false});
}

void read_turns(const Line& line, const char* key, const char* role_key, const char* text_key, TextRecord& record) {
  const Json& turns = line.array(key);
  for (size_t i = 0; i < turns.size(); ++i) {
    const std::string what = fmt::format("{}[{}]", key, i);
    const Json& turn = turns[i];
    for (const char* needed : {role_key, text_key}) {
      if (!turn.is_object() || !turn.contains(needed)) line.refuse(key, fmt::format("{} has no \"{}\"", what, needed));
    }
    const std::string role = line.string_in(key, turn.at(role_key), what + "." + role_key);
    const std::string text = line.string_in(key, turn.at(text_key), what + "." + text_key);
    const std::string before = i == 0 ? "" : "\n";
    switch (role_of(line, key, role)) {
      case Role::kSystem:
        add_prompt(record, before + "<|system|>\n" + text);
        break;
      case Role::kUser:
        add_prompt(record, before + "<|user|>\n" + text);
        break;
      case Role::kAssistant:
        add_prompt(record, before + "<|assistant|>\n");
        record.parts.push_back({text, true, true});
        break;
    }
  }
}

void read_instruction(const Line& line, TextRecord& record) {
  std::string prompt = line.string("instruction");
  const std::string input = line.has("input") ? line.string("input") : "";
  if (!input.empty()) prompt += "\n\n" + input;
  record.parts = {{prompt + "\n\n", false}, {line.string("output"), true}};
}

void read_choices(const Line& line, TextRecord& record) {
  record.parts = {{line.string("prompt"), false}};
  for (const Json& choice : line.array("choices")) {
    record.choices.push_back(line.string_in("choices", choice, fmt::format("choices[{}]", record.choices.size())));
  }
  const Json& answer = line.at("answer");
  const bool in_range = answer.is_number_integer() && answer >= Json(0) && answer < Json(record.choices.size());
  if (!in_range) {
    line.refuse("answer", fmt::format("\"answer\" is {}, expected an index from 0 to {}", printable(answer.dump(), 40),
                                      record.choices.size() - 1));
  }
  record.answer = answer.get<int64_t>();
}

TextRecord record_of(const Line& line) {
  TextRecord record;
  record.line = line.number();
  if (line.has("messages"))
    read_turns(line, "messages", "role", "content", record);
  else if (line.has("conversations"))
    read_turns(line, "conversations", "from", "value", record);
  else if (line.has("instruction"))
    read_instruction(line, record);
  else if (line.has("choices"))
    read_choices(line, record);
  else if (line.has("prompt"))
    record.parts = {{line.string("prompt"), false}, {line.string("completion"), true}};
  else if (line.has("text"))
    record.parts = {{line.string("text"), true}};
  else
    line.refuse("", "unknown shape: expected text, messages, conversations, instruction and output, or prompt");
  return record;
}

// Collects records; a problem either ends the reading or is counted.
class Collector {
 public:
  Collector(const ReadOptions& options, ReadReport* report) : skip_invalid_(options.skip_invalid), report_(report) {}

  void add(TextRecord record) {
    records_.push_back(std::move(record));
    if (report_ != nullptr) ++report_->records;
  }
  void reject(const Error& error) {
    if (!skip_invalid_ || error.kind() != ErrorKind::kInput) throw error;
    if (report_ == nullptr) return;
    ++report_->skipped;
    if (report_->first_problems.size() < kMaxProblems) report_->first_problems.emplace_back(error.what());
  }
  std::vector<TextRecord> take() { return std::move(records_); }

 private:
  bool skip_invalid_;
  ReadReport* report_;
  std::vector<TextRecord> records_;
};

bool is_blank(const std::string& line) { return line.find_first_not_of(" \t\r") == std::string::npos; }

void read_json_lines(LineReader& reader, Collector& collector) {
  const std::string file = reader.path().string();
  std::string text;
  for (auto status = reader.next(text); status != LineReader::Status::kEnd; status = reader.next(text)) {
    if (status == LineReader::Status::kLine && is_blank(text)) continue;
    try {
      check(status == LineReader::Status::kLine, ErrorKind::kInput, "{}:{}:1: line is longer than {} bytes", file,
            reader.line_number(), reader.max_line_bytes());
      collector.add(record_of(Line(file, reader.line_number(), text)));
    } catch (const Error& error) {
      collector.reject(error);
    }
  }
}

// The lines between two blank ones. Its first problem makes the whole block invalid.
class Block {
 public:
  Block(const LineReader& reader, Collector& collector) : reader_(reader), collector_(collector) {}

  void add(LineReader::Status status, const std::string& line) {
    if (valid_ && lines_++ == 0) record_.line = reader_.line_number();
    if (!valid_) return;
    if (lines_ > 1) text_ += '\n';
    text_ += line;
    const size_t invalid = text::find_invalid_utf8(line);
    const bool too_long =
        status == LineReader::Status::kTooLong || static_cast<int64_t>(text_.size()) > reader_.max_line_bytes();
    if (invalid == std::string::npos && !too_long) return;
    valid_ = false;
    text_.clear();
    const std::string place = fmt::format("{}:{}", reader_.path().string(), reader_.line_number());
    collector_.reject(Error(ErrorKind::kInput, too_long ? fmt::format("{}:1: {} bytes without a blank line", place,
                                                                      reader_.max_line_bytes())
                                                        : fmt::format("{}:{}: not UTF-8", place, invalid + 1)));
  }
  void finish() {
    if (valid_ && lines_ > 0) {
      record_.parts = {{std::move(text_), true}};
      collector_.add(std::move(record_));
    }
    record_ = {};
    text_.clear();
    lines_ = 0;
    valid_ = true;
  }

 private:
  const LineReader& reader_;
  Collector& collector_;
  TextRecord record_;
  std::string text_;
  int64_t lines_ = 0;
  bool valid_ = true;
};

void read_text(LineReader& reader, Collector& collector) {
  Block block(reader, collector);
  std::string text;
  for (auto status = reader.next(text); status != LineReader::Status::kEnd; status = reader.next(text)) {
    if (status == LineReader::Status::kLine && is_blank(text))
      block.finish();
    else
      block.add(status, text);
  }
  block.finish();
}

}  // namespace

std::vector<TextRecord> read_records(const std::filesystem::path& file, const ReadOptions& options,
                                     ReadReport* report) {
  const std::string extension = file.extension().string();
  const auto is_one_of = [&](std::initializer_list<const char*> list) {
    return std::find(list.begin(), list.end(), extension) != list.end();
  };
  const bool text = is_one_of({".txt", ".text", ".md"});
  check(text || is_one_of({".jsonl", ".ndjson", ".json"}), ErrorKind::kInput,
        "{}: unknown kind of data file, expected .jsonl, .ndjson, .json, .txt, .text or .md", file.string());
  LineReader reader(file, options.max_line_bytes);
  Collector collector(options, report);
  if (text)
    read_text(reader, collector);
  else
    read_json_lines(reader, collector);
  return collector.take();
}

}  // namespace lightmoe
