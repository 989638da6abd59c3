// Sharded checkpoints whose index and shards disagree, or whose index leads out of the directory.

#include "loaders/safetensors_index.h"
#include "loaders/json.h"

#include <sys/stat.h>

#include "loaders/safetensors.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::fails_with;
using testing::put_file;
using testing::safetensors_bytes;
using testing::TempDir;

constexpr auto kInput = ErrorKind::kInput;

std::string shard(const std::string& tensor) {
  return safetensors_bytes("{\"" + tensor + R"(":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "data");
}
// A checkpoint of two shards, one tensor each.
void put_checkpoint(const TempDir& dir, const std::string& index) {
  put_file(dir / "one.safetensors", shard("a"));
  put_file(dir / "two.safetensors", shard("b"));
  put_file(dir / "model.safetensors.index.json", index);
}
::testing::AssertionResult refused(const std::string& index, std::vector<std::string> pieces) {
  const TempDir dir;
  put_checkpoint(dir, index);
  pieces.push_back("model.safetensors.index.json");
  return fails_with(kInput, pieces, [&] { Checkpoint checkpoint(dir.path()); });
}

TEST(SafetensorsIndex, AgreesWithItsShards) {
  const TempDir dir;
  for (const std::string total : {R"({"total_size":8})", R"({"total_size":8.0})", "{}", "null"}) {
    put_checkpoint(dir, R"({"metadata":)" + total + R"(,"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})");
    const Checkpoint checkpoint(dir.path());
    EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b"}));
    EXPECT_EQ(checkpoint.read("b", DType::kU8).data<uint8_t>()[3], 'a');
    EXPECT_EQ(checkpoint.total_bytes(), 8);
    EXPECT_TRUE(fails_with(kInput, {"\"c\"", "2 tensors in 2 files"}, [&] { checkpoint.info("c"); }));
  }
}

TEST(SafetensorsIndex, DisagreementsShowBothSides) {
  EXPECT_TRUE(refused(R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors","c":"two.safetensors"}})",
                      {"lists 1 tensors", "c in two.safetensors"}));
  EXPECT_TRUE(refused(R"({"weight_map":{"a":"two.safetensors","b":"one.safetensors"}})",
                      {"lists 2 tensors", "a in two.safetensors", "b in one.safetensors"}));
  EXPECT_TRUE(refused(R"({"metadata":{"total_size":9},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})",
                      {"total_size is 9", "8 bytes"}));
  EXPECT_TRUE(refused(R"({"weight_map":{"a":"one.safetensors","a":"two.safetensors"}})", {"duplicate key \"a\""}));
  for (const char* total : {"-1", "8.5", "\"8\"", "1e300", "[]"}) {
    EXPECT_TRUE(refused(std::string(R"({"metadata":{"total_size":)") + total +
                            R"(},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})",
                        {"total_size"}))
        << total;
  }
}

TEST(SafetensorsIndex, ListsTheFirstFiveOfMany) {
  std::string map = R"({"weight_map":{"b":"two.safetensors","a":"one.safetensors")";
  for (int i = 0; i < 100; ++i) map += ",\"t" + std::to_string(i) + "\":\"one.safetensors\"";
  EXPECT_TRUE(refused(map + "}}", {"lists 100 tensors", "t4 in one", "..."}));
}

TEST(SafetensorsIndex, TensorInTwoShardsIsRefused) {
  const TempDir dir;
  put_checkpoint(dir, R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})");
  put_file(
      dir / "two.safetensors",
      safetensors_bytes(
          R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
          "12345678"));
  EXPECT_TRUE(
      fails_with(kInput, {"does not list 1", "a in two.safetensors"}, [&] { Checkpoint checkpoint(dir.path()); }));
}

TEST(SafetensorsIndex, MissingShardIsNamed) {
  EXPECT_TRUE(fails_with(kInput, {"three.safetensors", "cannot open"}, [] {
    const TempDir dir;
    put_checkpoint(dir, R"({"weight_map":{"a":"one.safetensors","b":"three.safetensors"}})");
    Checkpoint checkpoint(dir.path());
  }));
}

TEST(SafetensorsIndex, ShardNamesStayInTheDirectory) {
  const TempDir dir;
  std::filesystem::create_directory(dir / "inner");
  put_file(dir / "outside.safetensors", shard("a"));  // would be readable: must be refused before it is opened
  for (const std::string name :
       {"../outside.safetensors", "/etc/passwd", "..", ".", "", "inner/../x", "a\\\\b", "nul\\u0000byte"}) {
    put_file(dir / "inner/model.safetensors.index.json", "{\"weight_map\":{\"a\":\"" + name + "\"}}");
    EXPECT_TRUE(fails_with(kInput, {"index.json", "\"a\"", "plain file name"}, [&] {
      Checkpoint checkpoint(dir / "inner");
    })) << name;
  }
  put_file(dir / "inner/model.safetensors.index.json", R"({"weight_map":{"a":")" + std::string(256, 'x') + "\"}}");
  EXPECT_TRUE(fails_with(kInput, {"plain file name"}, [&] { Checkpoint checkpoint(dir / "inner"); }));
  ASSERT_EQ(::mkfifo((dir / "inner/fifo").c_str(), 0600), 0);
  put_file(dir / "inner/model.safetensors.index.json", R"({"weight_map":{"a":"fifo"}})");
  EXPECT_TRUE(fails_with(kInput, {"fifo", "a FIFO"}, [&] { Checkpoint checkpoint(dir / "inner"); }));
}

TEST(SafetensorsIndex, WrongTypesAreRefused) {
  for (const char* text :
       {"[]", "{}", "1", "null", R"({"weight_map":[]})", R"({"weight_map":null})", R"({"weight_map":{"a":1}})",
        R"({"weight_map":{"a":null}})", R"({"metadata":1,"weight_map":{}})", "{", "{}x", ""}) {
    EXPECT_TRUE(refused(text, {})) << text;
  }
  std::string many = R"({"weight_map":{)";
  for (int i = 0; i < 5000; ++i) many += (i ? ",\"" : "\"") + std::to_string(i) + "\":\"s" + std::to_string(i) + "\"";
  EXPECT_TRUE(refused(many + "}}", {"more than 4096 shards"}));
}

TEST(Checkpoint, SaysWhatIsMissing) {
  const TempDir dir;
  EXPECT_TRUE(fails_with(kInput, {dir.path().string(), "neither model.safetensors nor"},
                         [&] { Checkpoint checkpoint(dir.path()); }));
  put_file(dir / "pytorch_model.bin", "x");
  EXPECT_TRUE(fails_with(kInput, {"convert it to safetensors"}, [&] { Checkpoint checkpoint(dir.path()); }));
  EXPECT_TRUE(fails_with(kInput, {"nowhere", "cannot open"}, [&] { Checkpoint checkpoint(dir / "nowhere"); }));
  put_file(dir / "a.safetensors", shard("a"));
  EXPECT_TRUE(Checkpoint(dir / "a.safetensors").contains("a"));
}

}  // namespace
}  // namespace lightmoe
