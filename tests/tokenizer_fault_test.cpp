// Hostile and foreign tokenizer files: each is refused with the place in the file, or does exactly what it says.

#include <gtest/gtest.h>

#include "loaders/json.h"
#include "loaders/tokenizer.h"
#include "tests/support/files.h"
#include "tests/support/program.h"

namespace lightmoe {
namespace {

using testing::fails_with;
using testing::get_file;
using testing::put_file;
using testing::run_lightmoe;
using testing::TempDir;

const std::string kSmall = "tests/data/tokenizer/tokenizer.json";

Json value_of(const std::string& text) { return parse_json(text, "test"); }

struct Change {
  std::string where;  // JSON pointer
  std::string value;
  std::vector<std::string> message;
};

TEST(TokenizerFaults, EachPieceIsUnderstoodOrRefusedByName) {
  const std::vector<Change> changes = {
      {"/version", "\"2.0\"", {"version", "2.0"}},
      {"/extra", "1", {"unknown key \"extra\""}},
      {"/truncation", R"({"max_length": 5})", {"truncation", "null"}},
      {"/padding", "{}", {"padding"}},
      {"/normalizer", R"({"type": "NFKC"})", {"normalizer", "NFKC"}},
      {"/normalizer",
       R"({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]})",
       {"normalizer.normalizers[1]", "Lowercase"}},
      {"/normalizer", "7", {"normalizer"}},
      {"/pre_tokenizer", "null", {"pre_tokenizer", "byte-level"}},
      {"/pre_tokenizer", R"({"type": "Whitespace"})", {"pre_tokenizer", "Whitespace"}},
      {"/pre_tokenizer", R"({"type": "Digits", "individual_digits": true})", {"pre_tokenizer", "ByteLevel"}},
      {"/pre_tokenizer", R"({"type": "Sequence", "pretokenizers": []})", {"pre_tokenizer", "ByteLevel"}},
      {"/pre_tokenizer",
       R"({"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "Digits"}]})",
       {"pretokenizers[1]", "Digits after ByteLevel"}},
      {"/pre_tokenizer", R"({"type": "ByteLevel", "use_regex": 1})", {"use_regex", "true or false"}},
      {"/pre_tokenizer", R"({"type": "ByteLevel", "use_regexp": true})", {"unknown key \"use_regexp\""}},
      {"/pre_tokenizer/pretokenizers/0",
       R"({"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed", "invert": false})",
       {"behavior", "Removed"}},
      {"/pre_tokenizer/pretokenizers/0",
       R"({"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": true})",
       {"invert"}},
      {"/pre_tokenizer/pretokenizers/0",
       R"({"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated"})",
       {"String"}},
      {"/pre_tokenizer/pretokenizers/0",
       R"({"type": "Split", "pattern": {"Regex": "\\w"}, "behavior": "Isolated"})",
       {"regex"}},
      {"/post_processor", R"({"type": "BertProcessing"})", {"post_processor", "BertProcessing"}},
      {"/post_processor",
       R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}})",
       {"post_processor.single", "adds tokens"}},
      {"/decoder", "null", {"decoder"}},
      {"/decoder", R"({"type": "WordPiece"})", {"decoder", "WordPiece"}},
      {"/model/type", "\"WordPiece\"", {"model", "WordPiece", "BPE"}},
      {"/model/type", "3", {"model.type", "string"}},
      {"/model/dropout", "0.1", {"model.dropout", "0.1"}},
      {"/model/unk_token", "\"<unk>\"", {"model.unk_token", "<unk>"}},
      {"/model/continuing_subword_prefix", "\"##\"", {"model.continuing_subword_prefix"}},
      {"/model/end_of_word_suffix", "\"</w>\"", {"model.end_of_word_suffix"}},
      {"/model/fuse_unk", "true", {"model.fuse_unk"}},
      {"/model/byte_fallback", "true", {"model.byte_fallback"}},
      {"/model/ignore_merges", "true", {"model.ignore_merges"}},
      {"/model/surprise", "null", {"unknown key \"surprise\""}},
      {"/model/vocab", "[]", {"model.vocab", "array"}},
      {"/model/vocab/zz", "-1", {"model.vocab \"zz\"", "id -1"}},
      {"/model/vocab/zz", "1.5", {"id 1.5"}},
      {"/model/vocab/zz", "\"7\"", {"id \"7\""}},
      {"/model/vocab/zz", "4294967296", {"id 4294967296"}},
      {"/model/vocab/zz", "18446744073709551615", {"id 18446744073709551615"}},
      {"/model/vocab/zz", "3000000", {"id 3000000", "2097151"}},
      {"/model/vocab/zz", "100", {"id 100", "\"zz\""}},
      {"/model/vocab/", "400", {"empty token"}},
      {"/model/merges", "{}", {"model.merges", "object"}},
      {"/model/merges/0", "\"ab\"", {"model.merges[0]", "one space"}},
      {"/model/merges/0", "\"a b c\"", {"model.merges[0]"}},
      {"/model/merges/0", R"(["a"])", {"model.merges[0]", "1 parts"}},
      {"/model/merges/0", R"(["a", 2])", {"model.merges[0]"}},
      {"/model/merges/0", "5", {"model.merges[0]"}},
      {"/model/merges/3", "\"zq zq\"", {"model.merges[3]", "zq"}},
      {"/model/merges/3", "\"q z\"", {"model.merges[3]", "\"qz\""}},
      {"/added_tokens/0", "7", {"added_tokens[0]", "object"}},
      {"/added_tokens/0/id", "-5", {"added_tokens[0].id", "-5"}},
      {"/added_tokens/0/id", "17", {"added_tokens[0]", "<|endoftext|>", "model.vocab"}},
      {"/added_tokens/0/content", "\"<new>\"", {"id 0"}},
      {"/added_tokens/0/content", "\"\"", {"empty token"}},
      {"/added_tokens/1/content", "\"<|endoftext|>\"", {"added_tokens[1]", "twice"}},
      {"/added_tokens/0/special", "1", {"special", "true or false"}},
      {"/added_tokens/0/color", "1", {"unknown key \"color\""}},
  };
  const Json base = read_json_file(kSmall);
  for (const Change& change : changes) {
    Json changed = base;
    changed[Json::json_pointer(change.where)] = value_of(change.value);
    std::vector<std::string> message = change.message;
    message.push_back("t.json: ");
    EXPECT_TRUE(fails_with(ErrorKind::kInput, message, [&] { Tokenizer::parse(changed.dump(), "t.json"); }))
        << change.where << " = " << change.value;
  }
  Json without = base;
  without.erase("model");
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"model: missing"}, [&] { Tokenizer::parse(without.dump(), "t.json"); }));
  Json repeated = base;
  repeated["model"]["merges"].push_back(base["model"]["merges"][5]);
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"merged twice"}, [&] { Tokenizer::parse(repeated.dump(), "t.json"); }));
}

TEST(TokenizerFaults, DefaultsInOtherWordsAreAccepted) {
  const Json base = read_json_file(kSmall);
  const std::string text = "The experts share 12 bases.";
  const std::vector<int32_t> expected = Tokenizer::parse(base.dump(), "x").encode(text);
  const std::vector<std::pair<std::string, std::string>> changes = {
      {"/model/continuing_subword_prefix", "\"\""},
      {"/model/dropout", "0.0"},
      {"/normalizer", R"({"type": "Sequence", "normalizers": [{"type": "NFC"}]})"},
      {"/post_processor", R"({"type": "ByteLevel", "trim_offsets": false})"},
      {"/post_processor", R"({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [], "special_tokens": {}})"},
      {"/pre_tokenizer/pretokenizers/0",
       R"({"type": "Split", "pattern": {"Regex": "\\p{N}"}, "behavior": "Isolated"})"},
      {"/added_tokens", "null"},
  };
  for (const auto& [where, value] : changes) {
    Json changed = base;
    changed[Json::json_pointer(where)] = value_of(value);
    EXPECT_EQ(Tokenizer::parse(changed.dump(), "x").encode(text), expected) << where;
  }
  Json pairs = base;
  for (Json& merge : pairs["model"]["merges"]) {
    const auto both = merge.get<std::string>();
    merge = Json::array({both.substr(0, both.find(' ')), both.substr(both.find(' ') + 1)});
  }
  EXPECT_EQ(Tokenizer::parse(pairs.dump(), "x").encode(text), expected);
}

TEST(TokenizerFaults, MissingBytesAreAnErrorWhenMet) {
  const std::string file = R"({"version": "1.0", "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
    "decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 5}, "merges": ["a b"]}})";
  const Tokenizer tokenizer = Tokenizer::parse(file, "t.json");
  EXPECT_EQ(tokenizer.encode("aba"), (std::vector<int32_t>{5, 0}));
  EXPECT_EQ(tokenizer.vocab_size(), 6);
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"t.json", "byte 0x63"}, [&] { tokenizer.encode("abc"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"t.json", "token id 3"}, [&] { tokenizer.decode({3}); }));
}

TEST(TokenizerFaults, EveryPrefixIsRefused) {
  const std::string file = get_file(kSmall);
  for (size_t length = 0; length + 2 < file.size(); length += length < 2000 ? 1 : 97) {
    EXPECT_TRUE(fails_with(ErrorKind::kInput, {"t.json"}, [&] { Tokenizer::parse(file.substr(0, length), "t.json"); }));
  }
}

TEST(TokenizerFaults, FilesAndDirectories) {
  const TempDir dir;
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"tokenizer.json"}, [&] { Tokenizer::load(dir.path()); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"none.json"}, [&] { Tokenizer::load(dir / "none.json"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"/dev/zero"}, [&] { Tokenizer::load("/dev/zero"); }));
  put_file(dir / "big.json", "");
  std::filesystem::resize_file(dir / "big.json", uint64_t{1} << 40);
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"big.json"}, [&] { Tokenizer::load(dir / "big.json"); }));
}

TEST(TokenizeVerb, DecodeIsTheInverse) {
  const TempDir dir;
  const std::string texts =
      "{\"text\":\"The router picks.\"}\n{\"text\":\"\"}\n{\"text\":\"\u00e9 \\\"q\\\" \\n<|endoftext|>12\"}\n";
  put_file(dir / "texts.jsonl", texts);
  const auto encoded = run_lightmoe({"tokenize", "tests/data/tokenizer", "--jsonl", dir / "texts.jsonl"});
  ASSERT_EQ(encoded.exit_code, 0) << encoded.err;
  EXPECT_EQ(parse_json(encoded.out.substr(0, encoded.out.find('\n')), "x").get<std::vector<int32_t>>(),
            Tokenizer::load(kSmall).encode("The router picks."));
  put_file(dir / "ids.jsonl", encoded.out);
  EXPECT_EQ(run_lightmoe({"tokenize", kSmall, "--jsonl", dir / "ids.jsonl", "--decode"}).out, texts);
  const auto skipped = run_lightmoe({"tokenize", kSmall, "--jsonl", dir / "ids.jsonl", "--decode", "--skip-special"});
  EXPECT_EQ(skipped.out.find("endoftext"), std::string::npos);

  for (const std::string line : {"{\"text\": 3}", "[400]", "[-1]", "{", "7"}) {
    put_file(dir / "bad.jsonl", "{\"text\":\"a\"}\n" + line + "\n");
    const auto result = run_lightmoe({"tokenize", kSmall, "--jsonl", dir / "bad.jsonl"});
    EXPECT_EQ(result.exit_code, 3) << line;
    EXPECT_NE(result.err.find("bad.jsonl:2:"), std::string::npos) << result.err;
    put_file(dir / "bad.jsonl", "[1]\n" + line + "\n");
    const auto decoded = run_lightmoe({"tokenize", kSmall, "--jsonl", dir / "bad.jsonl", "--decode"});
    EXPECT_EQ(decoded.exit_code, 3) << line;
    EXPECT_NE(decoded.err.find("bad.jsonl:2:"), std::string::npos) << decoded.err;
  }
}

}  // namespace
}  // namespace lightmoe
