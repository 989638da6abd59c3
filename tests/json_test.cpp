#include "loaders/json.h"

#include <clocale>

#include "loaders/output.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

using testing::cap_memory_growth;
using testing::fails_with;
using testing::in_child;
using testing::put_file;
using testing::TempDir;

::testing::AssertionResult refused(const std::string& text, const std::vector<std::string>& pieces,
                                   const JsonLimits& limits = {}) {
  return fails_with(ErrorKind::kInput, pieces, [&] { parse_json(text, "file.json", limits); });
}

TEST(Json, KeepsValuesAndOrder) {
  const std::string text = R"({"z":[1,-2,2.5,true,null,"\u00e9\n"],"a":{"b":{}},"big":18446744073709551615})";
  EXPECT_EQ(parse_json(text, "x"), Json::parse(text));
  EXPECT_EQ(parse_json(text, "x").dump(), Json::parse(text).dump());
  EXPECT_EQ(parse_json("\xef\xbb\xbf{}", "x"), Json::object());  // a BOM is tolerated
  EXPECT_EQ(parse_json(" 7 ", "x"), 7);
}

TEST(Json, SaysWhere) {
  EXPECT_TRUE(refused("{\n  \"a\": 1,\n  \"b\" 2}", {"file.json:3:7:", "':'"}));
  EXPECT_TRUE(refused("", {"file.json:1:1:"}));
  EXPECT_TRUE(refused("{\"a\":1", {"file.json:1:7:"}));
  EXPECT_TRUE(refused("[1,]", {"file.json:1:4:"}));
  EXPECT_TRUE(refused("{} {}", {"file.json:1:4:"}));
  EXPECT_TRUE(refused("[1e999]", {"file.json:1:"}));
  EXPECT_TRUE(refused("[\"\xc3\x28\"]", {"file.json:1:4:", "UTF-8"}));
  EXPECT_TRUE(refused("[\"\\ud83d\"]", {"file.json:1:", "surrogate"}));
  EXPECT_TRUE(refused(std::string("{}\0{\"hidden\":1}", 14), {"file.json:1:3:", "NUL"}));
  for (const char* text : {"nan", "Infinity", "01", "+1", "1.", ".5", "'a'", "{a:1}", "/*c*/1", "[1 2]", "\"\t\""}) {
    EXPECT_TRUE(refused(text, {"file.json:1:"})) << text;
  }
}

TEST(Json, DuplicateKeysAreRefusedAtEveryDepth) {
  EXPECT_TRUE(refused("{\"a\":1,\n\"a\":2}", {"file.json:2:", "duplicate key \"a\""}));
  EXPECT_TRUE(refused(R"([{"x":{"k":1,"\u006b":2}}])", {"duplicate key \"k\""}));  // the same key, spelled otherwise
  EXPECT_NO_THROW(parse_json(R"({"a":{"a":1},"b":{"a":1}})", "x"));
}

TEST(Json, CapsHold) {
  EXPECT_TRUE(refused("[[[[1]]]]", {"nested deeper than 3"}, {.max_depth = 3}));
  EXPECT_NO_THROW(parse_json("[[[1]]]", "x", {.max_depth = 3}));
  EXPECT_TRUE(refused("[1,2,3]", {"more than 3 values"}, {.max_values = 3}));
  EXPECT_NO_THROW(parse_json("[1,2]", "x", {.max_values = 3}));
  EXPECT_TRUE(refused("[1,2]", {"5 bytes", "at most 4"}, {.max_bytes = 4}));
  EXPECT_TRUE(refused(std::string(1'000'000, '['), {"nested deeper than 64"}));
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  EXPECT_TRUE(refused(objects, {"nested deeper than 64"}));
}

TEST(Json, FilesPastTheCapAreNotRead) {
  const TempDir dir;
  put_file(dir / "sparse.json", "{}");
  std::filesystem::resize_file(dir / "sparse.json", uint64_t{1} << 40);
  EXPECT_EQ(0, in_child([&] {
              cap_memory_growth(int64_t{16} << 20);
              return fails_with(ErrorKind::kInput, {"sparse.json", "1099511627776 bytes"},
                                [&] { read_json_file((dir / "sparse.json").string()); })
                         ? 0
                         : 1;
            }));
}

TEST(Json, NumbersDoNotDependOnTheLocale) {
  const std::string before = std::setlocale(LC_ALL, nullptr);
  bool tried = false;
  for (const char* name : {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "C.UTF-8", "C"}) {
    if (std::setlocale(LC_ALL, name) == nullptr) continue;
    tried = true;
    EXPECT_EQ(parse_json("[0.5,1e-5]", "x")[1].get<double>(), 1e-5) << name;
    EXPECT_EQ(parse_json("[0.5,1e-5]", "x").dump(), "[0.5,1e-05]") << name;
  }
  EXPECT_TRUE(tried);
  std::setlocale(LC_ALL, before.c_str());
}

TEST(Json, PrintableTextFitsOneLine) {
  EXPECT_EQ(printable("plain text"), "plain text");
  EXPECT_EQ(printable("a\nb\x1b[31m\xff"), "a\\x0ab\\x1b[31m\\xff");
  EXPECT_LT(printable(std::string(1'000'000, 'x')).size(), 200u);
}

}  // namespace
}  // namespace lightmoe
