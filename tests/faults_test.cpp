// Hostile model files: every one is refused with a message that names file, tensor, expected and actual, without believing a
// size the file states, without hanging, and with the inputs as they were.

#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "loaders/output.h"
#include "loaders/safetensors.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::cap_memory_growth;
using testing::fails_with;
using testing::get_file;
using testing::in_child;
using testing::put_file;
using testing::safetensors_bytes;
using testing::TempDir;

constexpr auto kInput = ErrorKind::kInput;
const std::string kTwo =
    R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}})";

std::string length_prefix(uint64_t length) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes;
}

// The file with these bytes is refused; the message names it and every piece.
::testing::AssertionResult refused(const std::string& bytes, std::vector<std::string> pieces) {
  const TempDir dir;
  put_file(dir / "x.safetensors", bytes);
  pieces.push_back("x.safetensors");
  auto result = fails_with(kInput, pieces, [&] { SafetensorsFile file(dir / "x.safetensors"); });
  if (get_file(dir / "x.safetensors") != bytes) return ::testing::AssertionFailure() << "the input changed";
  return result;
}
::testing::AssertionResult header_refused(const std::string& header, const std::vector<std::string>& pieces,
                                          size_t data_bytes = 11) {
  return refused(safetensors_bytes(header, std::string(data_bytes, 'x')), pieces);
}

TEST(Faults, EveryPrefixOfAFileIsRefused) {
  const std::string whole = safetensors_bytes(kTwo, "12345678abc");
  const TempDir dir;
  put_file(dir / "x.safetensors", whole);
  EXPECT_EQ(SafetensorsFile(dir / "x.safetensors").tensors().size(), 2u);
  for (size_t length = 0; length < whole.size(); ++length) {
    EXPECT_TRUE(refused(whole.substr(0, length), {"download it again"})) << length;
  }
  EXPECT_TRUE(refused(whole + "!", {"126", "127", "1 trailing"}));
  EXPECT_TRUE(refused(whole.substr(0, whole.size() - 1), {"\"b\"", "11", "10", "truncated"}));
}

TEST(Faults, GitLfsPointerIsNamed) {
  EXPECT_TRUE(
      refused("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13838323712\n", {"Git-LFS pointer"}));
}

TEST(Faults, HeaderLengthBombsTakeNoMemory) {
  const TempDir dir;
  for (const uint64_t length :
       {~uint64_t{0}, uint64_t{1} << 63, ~uint64_t{0} - 7, uint64_t{100'000'001}, uint64_t{99'999'999}, uint64_t{4}}) {
    put_file(dir / "x.safetensors", length_prefix(length) + "{}");
    EXPECT_EQ(0, in_child([&] {
                cap_memory_growth(int64_t{16} << 20);
                const auto result = fails_with(
                    kInput, {"x.safetensors", "header", std::to_string(length > 100'000'000 ? length : length + 8)},
                    [&] { SafetensorsFile file(dir / "x.safetensors"); });
                if (!result) std::fprintf(stderr, "%s\n", result.message());
                return result ? 0 : 1;
              }))
        << length;
  }
  EXPECT_TRUE(refused(length_prefix(0) + "{}", {"does not start with '{'"}));
}

// A small header that announces 2^60 bytes in one tensor, and a checkpoint read through it.
TEST(Faults, LyingSizesTakeNoMemory) {
  const std::string huge =
      R"({"a":{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976]}})";
  EXPECT_TRUE(header_refused(huge, {"\"a\"", "1152921504606846976", "11"}));
}

TEST(Faults, OffsetsMustTileTheFile) {
  const auto two = [](const char* a, const char* b) {
    return std::string(R"({"first":{"dtype":"U8","shape":[4],"data_offsets":)") + a +
           R"(},"second":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}";
  };
  EXPECT_TRUE(header_refused(two("[0,4]", "[3,7]"), {"\"first\"", "\"second\"", "overlap"}, 7));
  EXPECT_TRUE(header_refused(two("[0,4]", "[0,4]"), {"\"first\"", "\"second\"", "overlap"}, 4));
  EXPECT_TRUE(header_refused(two("[0,4]", "[5,9]"), {"\"first\"", "\"second\"", "hole"}, 9));
  EXPECT_TRUE(header_refused(two("[1,5]", "[5,9]"), {"\"first\"", "start of the data", "hole"}, 9));
  EXPECT_TRUE(header_refused(two("[4,0]", "[4,8]"), {"\"first\"", "[4, 0]", "backwards"}, 8));
  EXPECT_TRUE(header_refused(two("[0,4]", "[4,8]"), {"1 trailing"}, 9));
  EXPECT_TRUE(header_refused(two("[0,4]", "[4,8]"), {"\"second\"", "8", "7"}, 7));
  EXPECT_TRUE(header_refused(two("[0,4]", "[4,18446744073709551615]"), {"\"second\"", "18446744073709551615"}, 8));
  EXPECT_TRUE(header_refused(two("[0,4]", "[-4,0]"), {"\"second\"", "non-negative"}, 8));
  EXPECT_TRUE(header_refused(two("[0,4]", "[4.0,8]"), {"\"second\"", "non-negative"}, 8));
  EXPECT_TRUE(header_refused(two("[0,4]", "[4,8,8]"), {"\"second\"", "two"}, 8));
  EXPECT_TRUE(header_refused(two("[0,4]", "null"), {"\"second\"", "two"}, 8));
}

TEST(Faults, ShapesAreChecked) {
  const auto shape = [](const std::string& text) {
    return R"({"t":{"dtype":"F32","shape":)" + text + R"(,"data_offsets":[0,8]}})";
  };
  const auto bad = [&](const std::string& text, const std::vector<std::string>& pieces) {
    return header_refused(shape(text), pieces, 8);
  };
  EXPECT_TRUE(bad("[4294967296,4294967296]", {"\"t\"", "overflows"}));
  EXPECT_TRUE(bad("[4611686018427387904,4]", {"\"t\"", "overflows"}));
  EXPECT_TRUE(bad("[9223372036854775807,9223372036854775807,0]", {"\"t\"", "overflows"}));
  EXPECT_TRUE(bad("[0,9223372036854775807,2]", {"\"t\"", "overflows"}));
  EXPECT_TRUE(bad("[18446744073709551615]", {"\"t\"", "18446744073709551615", "non-negative"}));
  EXPECT_TRUE(bad("[99999999999999999999999]", {"\"t\"", "non-negative"}));
  for (const char* dim : {"-1", "2.0", "\"2\"", "true", "null", "[2]", "1e1"}) {
    EXPECT_TRUE(bad(std::string("[") + dim + "]", {"\"t\""})) << dim;
  }
  EXPECT_TRUE(bad("2", {"\"t\"", "array"}));
  EXPECT_TRUE(bad("[3]", {"\"t\"", "hold 8 bytes", "F32 [3] needs 12"}));
  std::string thousand = "[1";
  for (int i = 1; i < 1000; ++i) thousand += ",1";
  EXPECT_TRUE(bad(thousand + "]", {"\"t\"", "64 dimensions"}));
  EXPECT_TRUE(bad("[" + std::string(100'000, '[') + std::string(100'000, ']') + "]", {"nested"}));
}

TEST(Faults, DtypesAreKnown) {
  const auto dtype = [](const std::string& text, const std::string& shape) {
    return R"({"t":{"dtype":)" + text + R"(,"shape":)" + shape + R"(,"data_offsets":[0,8]}})";
  };
  EXPECT_TRUE(header_refused(dtype("\"F7\"", "[2]"), {"\"t\"", "\"F7\" is unknown", "BF16"}, 8));
  EXPECT_TRUE(header_refused(dtype("\"f32\"", "[2]"), {"\"t\"", "\"f32\""}, 8));
  EXPECT_TRUE(header_refused(dtype("7", "[2]"), {"\"t\"", "not a string"}, 8));
  EXPECT_TRUE(header_refused(dtype("\"U8\"", "[7]"), {"\"t\"", "hold 8 bytes", "needs 7"}, 8));
  EXPECT_TRUE(header_refused(dtype("\"F4\"", "[17]"), {"\"t\"", "whole number of bytes"}, 8));
  EXPECT_TRUE(
      header_refused(dtype("\"F32\\n\\u001b[31m\"", "[2]"), {"\\x0a\\x1b[31m"}, 8));  // nothing reaches the terminal
  for (const char* good : {"\"F4\" [16]", "\"F6_E2M3\" [32]", "\"F8_E5M2FNUZ\" [8]", "\"C64\" [1]", "\"U16\" [2,2]"}) {
    const std::string text = good;
    const size_t space = text.find(' ');
    std::string header = dtype(text.substr(0, space), text.substr(space + 1));
    const size_t bytes = header.find("F6") == std::string::npos ? 8 : 24;
    if (bytes == 24) header.replace(header.find("[0,8]"), 5, "[0,24]");
    const TempDir dir;
    put_file(dir / "x.safetensors", safetensors_bytes(header, std::string(bytes, 'x')));
    EXPECT_EQ(SafetensorsFile(dir / "x.safetensors").tensors().size(), 1u) << good;
  }
}

TEST(Faults, HeadersMustBeOneCleanObject) {
  EXPECT_TRUE(header_refused(" " + kTwo, {"does not start with '{'"}));
  EXPECT_TRUE(header_refused("[]", {"does not start with '{'"}));
  EXPECT_TRUE(header_refused(kTwo + kTwo, {"header:1:"}));
  EXPECT_TRUE(header_refused(kTwo + std::string(5, '\0'), {"NUL byte"}));
  EXPECT_TRUE(header_refused("{\"\xff\":1}", {"header:1:3", "UTF-8"}));
  EXPECT_TRUE(header_refused(R"({"\ud800":1})", {"header:1:"}));
  EXPECT_TRUE(header_refused(R"({"a":)", {"header:1:"}));
  EXPECT_TRUE(header_refused(R"({"a":1})", {"\"a\"", "number", "expected an object"}));
  EXPECT_TRUE(header_refused(R"({"a":{}})", {"\"a\"", "no \"dtype\""}));
  EXPECT_TRUE(header_refused(R"({"a":{"dtype":"U8","shape":[11],"data_offsets":[0,11],"x":1}})",
                             {"\"a\"", "unknown header key \"x\""}));
  EXPECT_TRUE(header_refused(R"({"__metadata__":{"format":1}})", {"__metadata__", "\"format\"", "number"}));
  EXPECT_TRUE(header_refused(R"({"__metadata__":[]})", {"__metadata__", "array"}));
  EXPECT_TRUE(header_refused(R"({"":{"dtype":"U8","shape":[11],"data_offsets":[0,11]}})", {"name of 0 bytes"}));
  EXPECT_TRUE(header_refused("{\"" + std::string(5000, 'n') + R"(":{"dtype":"U8","shape":[11],"data_offsets":[0,11]}})",
                             {"5000"}));
  const TempDir dir;
  put_file(dir / "x.safetensors", safetensors_bytes(kTwo + "   ", "12345678abc"));  // padding at the end is legal
  EXPECT_EQ(SafetensorsFile(dir / "x.safetensors").tensors().size(), 2u);
  put_file(dir / "x.safetensors", safetensors_bytes("{}", ""));
  EXPECT_EQ(SafetensorsFile(dir / "x.safetensors").tensors().size(), 0u);
}

TEST(Faults, DuplicateKeysAreNamed) {
  const std::string entry = R"({"dtype":"U8","shape":[11],"data_offsets":[0,11]})";
  EXPECT_TRUE(header_refused("{\"twice\":" + entry + ",\"twice\":" + entry + "}", {"duplicate key \"twice\""}));
  EXPECT_TRUE(header_refused(R"({"a":{"dtype":"U8","dtype":"U8","shape":[11],"data_offsets":[0,11]}})",
                             {"duplicate key \"dtype\""}));
  EXPECT_TRUE(header_refused(R"({"__metadata__":{"k":"1","k":"2"}})", {"duplicate key \"k\""}));
}

TEST(Faults, HeaderOfManyTinyValuesIsBounded) {
  std::string header = "{";
  for (int i = 0; i < 100'000; ++i) header += "\"" + std::to_string(i) + "\":{},";
  header.back() = '}';
  EXPECT_TRUE(header_refused(header, {"no \"dtype\""}));
  std::string zeros = R"({"a":{"dtype":"U8","shape":[0)";
  for (int i = 0; i < 2'000'000; ++i) zeros += ",0";
  EXPECT_TRUE(header_refused(zeros + R"(],"data_offsets":[0,0]}})", {"more than 2000000 values"}));
}

TEST(Faults, OnlyRegularFilesAreOpened) {
  const TempDir dir;
  const auto opened = [&](const std::string& name) { return [&dir, name] { SafetensorsFile file(dir / name); }; };
  ASSERT_EQ(::mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_TRUE(fails_with(kInput, {"fifo", "a FIFO"}, opened("fifo")));  // and does not wait for a writer
  std::filesystem::create_directory(dir / "folder");
  EXPECT_TRUE(fails_with(kInput, {"folder", "a directory"}, opened("folder")));
  std::filesystem::create_symlink("loop", dir / "loop");
  EXPECT_TRUE(fails_with(kInput, {"loop", "cannot open"}, opened("loop")));
  std::filesystem::create_symlink("/dev/zero", dir / "zero");
  EXPECT_TRUE(fails_with(kInput, {"zero", "a device"}, opened("zero")));
  EXPECT_TRUE(fails_with(kInput, {"absent", "cannot open"}, opened("absent")));
  EXPECT_TRUE(fails_with(kInput, {"NUL"}, opened(std::string("a\0b", 3))));
  put_file(dir / "real", safetensors_bytes(kTwo, "12345678abc"));
  std::filesystem::create_symlink("real", dir / "link");  // as in the Hugging Face cache
  EXPECT_EQ(SafetensorsFile(dir / "link").tensors().size(), 2u);
}

TEST(Faults, FileThatShrinksIsAnErrorNotASignal) {
  const TempDir dir;
  put_file(dir / "x.safetensors", safetensors_bytes(kTwo, "12345678abc"));
  const SafetensorsFile file(dir / "x.safetensors");
  ASSERT_EQ(::truncate((dir / "x.safetensors").c_str(), 20), 0);
  EXPECT_TRUE(fails_with(ErrorKind::kIo, {"x.safetensors", "the file changed"}, [&] { file.read("a"); }));
}

}  // namespace
}  // namespace lightmoe
