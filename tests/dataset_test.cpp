#include "loaders/dataset.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <fstream>

#include "loaders/dataset_lines.h"
#include "loaders/safetensors.h"
#include "runtime/philox.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

using testing::fails_with;
using testing::put_file;
using testing::TempDir;

constexpr int32_t kEos = 0;

std::vector<TextRecord> read(const std::string& name, const std::string& contents, const ReadOptions& options = {},
                             ReadReport* report = nullptr) {
  const TempDir dir;
  put_file(dir / name, contents);
  return read_records(dir / name, options, report);
}

// [text] has loss, (text) has none, ! is an EOS of its own.
std::string shown(const TextRecord& record) {
  std::string out;
  for (const TextRecord::Part& part : record.parts) {
    out += (part.loss ? "[" : "(") + part.text + (part.loss ? "]" : ")") + (part.eos ? "!" : "");
  }
  return out;
}

TEST(ReadRecords, EveryShape) {
  const auto one = [](const std::string& line) { return shown(read("a.jsonl", line + "\n").at(0)); };
  EXPECT_EQ(one(R"({"text": "hi"})"), "[hi]");
  EXPECT_EQ(one(R"({"prompt": "2+2=", "completion": "4"})"), "(2+2=)[4]");
  EXPECT_EQ(one(R"({"instruction": "Add.", "input": "2 2", "output": "4", "text": "ignored"})"),
            "(Add.\n\n2 2\n\n)[4]");
  EXPECT_EQ(one(R"({"instruction": "Sing.", "input": "", "output": "la"})"), "(Sing.\n\n)[la]");
  EXPECT_EQ(one(R"({"instruction": "Sing.", "output": "la"})"), "(Sing.\n\n)[la]");
  EXPECT_EQ(one(R"({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]})"),
            "(<|user|>\nHi\n<|assistant|>\n)[Yo]!");
  EXPECT_EQ(one(R"({"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "A"}, )"
                R"({"from": "gpt", "value": "B"}, {"from": "human", "value": "C"}, {"from": "gpt", "value": "D"}]})"),
            "(<|system|>\nS\n<|user|>\nA\n<|assistant|>\n)[B]!(\n<|user|>\nC\n<|assistant|>\n)[D]!");
  const TextRecord choice = read("a.jsonl", R"({"prompt": "2+2", "choices": ["3", "4"], "answer": 1})").at(0);
  EXPECT_EQ(shown(choice), "(2+2)");
  EXPECT_EQ(choice.choices, (std::vector<std::string>{"3", "4"}));
  EXPECT_EQ(choice.answer, 1);
}

TEST(ReadRecords, ToleratesMarksLineEndsAndBlankLines) {
  const auto records = read("a.jsonl", "\xEF\xBB\xBF{\"text\":\"a\"}\r\n\n{\"text\":\"b\"}\n  \r\n{\"text\":\"c\"}");
  ASSERT_EQ(records.size(), 3u);
  EXPECT_EQ(records[1].line, 3);
  EXPECT_EQ(shown(records[2]), "[c]");
  EXPECT_EQ(read("a.jsonl", "").size(), 0u);
}

TEST(ReadRecords, ErrorsNameFileLineAndColumn) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"({"text": "a"} x)", "a.jsonl:2:15: "},
      {R"({"text": "a)", "a.jsonl:2:"},
      {R"([1])", "a.jsonl:2:1: is array"},
      {R"({"id": 1, "text": 7})", "a.jsonl:2:11: \"text\" is number"},
      {"{\"text\": \"a\xff\"}", "a.jsonl:2:"},
      {R"({"text": "\ud800"})", "a.jsonl:2:"},
      {R"({"text": "\udc00 "})", "a.jsonl:2:"},
      {R"({"text": "a", "text": "b"})", "duplicate key"},
      {R"({"messages": []})", "a.jsonl:2:2: \"messages\" is empty"},
      {R"({"messages": {}})", "expected an array"},
      {R"({"messages": [{"role": "user"}]})", "messages[0] has no \"content\""},
      {R"({"messages": ["user"]})", "messages[0] has no \"role\""},
      {R"({"messages": [{"role": "tool", "content": ""}]})", "role \"tool\""},
      {R"({"messages": [{"role": "user", "content": null}]})", "messages[0].content is null"},
      {R"({"instruction": "a"})", "key \"output\" is missing"},
      {R"({"prompt": "a"})", "key \"completion\" is missing"},
      {R"({"prompt": "a", "choices": ["b"], "answer": 1})",
       "a.jsonl:2:35: \"answer\" is 1, expected an index from 0 to 0"},
      {R"({"prompt": "a", "choices": ["b"], "answer": "0"})", "\"answer\" is \"0\""},
      {R"({"prompt": "a", "choices": [3], "answer": 0})", "choices[0] is number"},
      {R"({})", "unknown shape"},
      {std::string(100, '['), "nested deeper"},
      {std::string("{\"text\": \"a\0\"}", 14), "a.jsonl:2:"},
  };
  for (const auto& [line, message] : cases) {
    const std::string contents = "{\"text\":\"fine\"}\n" + line + "\n{\"text\":\"fine\"}\n";
    EXPECT_TRUE(fails_with(ErrorKind::kInput, {"a.jsonl:2:", message}, [&] { read("a.jsonl", contents); })) << line;
    ReadReport report;
    EXPECT_EQ(read("a.jsonl", contents, {.skip_invalid = true}, &report).size(), 2u) << line;
    EXPECT_EQ(report.records, 2);
    EXPECT_EQ(report.skipped, 1);
    ASSERT_EQ(report.first_problems.size(), 1u);
  }
}

TEST(ReadRecords, PrintsAFewProblemsOnly) {
  ReadReport report;
  std::string contents;
  for (int i = 0; i < 100; ++i) contents += "{\n";
  read("a.jsonl", contents, {.skip_invalid = true}, &report);
  EXPECT_EQ(report.skipped, 100);
  EXPECT_EQ(report.first_problems.size(), 5u);
}

TEST(ReadRecords, TextInBlocks) {
  const auto records = read("a.txt", "one\ntwo\r\n\n\n  \nthree\n\xC3\xA9");
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(shown(records[0]), "[one\ntwo]");
  EXPECT_EQ(shown(records[1]), "[three\n\u00e9]");
  EXPECT_EQ(records[1].line, 6);
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"a.txt:3:2: not UTF-8"}, [] { read("a.txt", "a\n\nb\xff\nc\n\nd"); }));
  EXPECT_EQ(read("a.txt", "a\n\nb\xff\nc\n\nd", {.skip_invalid = true}).size(), 2u);
  const ReadOptions small{.max_line_bytes = 7};
  EXPECT_EQ(read("a.txt", "abc\nabc\n\nabcdefg", small).size(), 2u);
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"a.txt:3:", "7 bytes"}, [&] { read("a.txt", "abc\nabc\na", small); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"a.txt:1:", "7 bytes"}, [&] { read("a.txt", "abcdefgh", small); }));
}

int64_t peak_memory_kib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6));
  }
  return 0;
}

// A gigabyte without a line end (a sparse file): refused after the cap, in memory of the cap; or skipped in one pass.
TEST(ReadRecords, EndlessLinesStayOutOfMemory) {
  const TempDir dir;
  for (const char* name : {"a.jsonl", "a.txt"}) {
    put_file(dir / name, "");
    std::filesystem::resize_file(dir / name, uint64_t{1} << 30);
    const ReadOptions options{.max_line_bytes = 1 << 20};
    const int64_t before = peak_memory_kib();
    EXPECT_TRUE(fails_with(ErrorKind::kInput, {std::string(name) + ":1:1: ", "1048576 bytes"},
                           [&] { read_records(dir / name, options, nullptr); }));
    EXPECT_LT(peak_memory_kib() - before, 16 << 10);
  }
  std::filesystem::resize_file(dir / "a.jsonl", uint64_t{64} << 20);
  std::ofstream(dir / "a.jsonl", std::ios::app) << "\n{\"text\": \"after\"}\n";
  ReadReport report;
  const auto records = read_records(dir / "a.jsonl", {.skip_invalid = true, .max_line_bytes = 1 << 20}, &report);
  ASSERT_EQ(records.size(), 1u);
  EXPECT_EQ(records[0].line, 2);
  EXPECT_EQ(report.skipped, 1);
}

TEST(ReadRecords, RegularFilesOnly) {
  const TempDir dir;
  std::filesystem::create_symlink("/dev/zero", dir / "zero.jsonl");
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"zero.jsonl", "regular file"},
                         [&] { read_records(dir / "zero.jsonl", {}, nullptr); }));
  ASSERT_EQ(mkfifo((dir / "fifo.jsonl").c_str(), 0600), 0);  // opening it would wait for a writer
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"fifo.jsonl", "regular file"},
                         [&] { read_records(dir / "fifo.jsonl", {}, nullptr); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"none.jsonl"}, [&] { read_records(dir / "none.jsonl", {}, nullptr); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"a.csv", ".jsonl"}, [&] { read("a.csv", "a,b"); }));
}

TEST(LineReader, EqualsSplittingAtAnyPlace) {
  const TempDir dir;
  Philox random(1);
  for (int i = 0; i < 20; ++i) {
    // Lines of all lengths around the buffer's border of 1 MiB.
    std::vector<std::string> lines;
    std::string contents(static_cast<size_t>(i), 'x');
    lines.push_back(contents + std::string((1 << 20) - 10, 'y'));
    for (int n = 0; n < 12; ++n) lines.emplace_back(random.below(4), 'z');
    contents.clear();
    for (const std::string& line : lines) contents += line + (random.below(2) == 0 ? "\n" : "\r\n");
    put_file(dir / "a", contents);
    LineReader reader(dir / "a", 2 << 20);
    std::string line;
    for (size_t n = 0; n < lines.size(); ++n) {
      ASSERT_EQ(reader.next(line), LineReader::Status::kLine);
      EXPECT_EQ(line, lines[n]);
      EXPECT_EQ(reader.line_number(), static_cast<int64_t>(n) + 1);
    }
    EXPECT_EQ(reader.next(line), LineReader::Status::kEnd);
  }
}

TEST(Tokenize, LossFallsOnAnswersAndTheirEos) {
  const Tokenizer tokenizer = Tokenizer::load("tests/data/tokenizer");
  TextRecord record;
  record.parts = {{"a", false}, {"bc", true, true}, {"d", false}, {"e", true, true}};
  const auto id = [&](char c) { return tokenizer.encode(std::string(1, c)).at(0); };
  const Document document = tokenize(record, tokenizer, kEos);
  EXPECT_EQ(document.ids, (std::vector<int32_t>{id('a'), id('b'), id('c'), kEos, id('d'), id('e'), kEos}));
  EXPECT_EQ(document.loss, (std::vector<uint8_t>{0, 1, 1, 1, 0, 1, 1}));
  EXPECT_EQ(tokenize(record, tokenizer, -1).ids.size(), 5u);
  record.parts = {{"a", true}, {"b", false}};
  EXPECT_EQ(tokenize(record, tokenizer, kEos).loss, (std::vector<uint8_t>{1, 0, 0}));

  std::vector<TextRecord> many(100, record);
  for (size_t i = 0; i < many.size(); ++i) many[i].parts[0].text = std::string(i, 'x');
  const std::vector<Document> documents = tokenize(many, tokenizer, kEos);
  ASSERT_EQ(documents.size(), many.size());
  for (size_t i = 0; i < many.size(); ++i) EXPECT_EQ(documents[i].ids, tokenize(many[i], tokenizer, kEos).ids);
}

}  // namespace
}  // namespace lightmoe
