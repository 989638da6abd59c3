#include "loaders/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "loaders/json.h"
#include "loaders/tokenizer_text.h"
#include "runtime/philox.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

using testing::fails_with;
using testing::get_file;
using Ids = std::vector<int32_t>;

constexpr const char* kSmall = "tests/data/tokenizer";

std::string random_text(Philox& random) {
  static const std::vector<std::string> kPieces = {"  ",     "'s", "'ll",    "'S",     "e\u0301", "a\u0323\u0300",
                                                   "\u212b", "\n", "\r\n",   "\u00a0", "\u3000",  "\u0085",
                                                   "\u180e", "12", "\u00b2", "the",    "experts"};
  std::string text;
  for (uint64_t i = 1 + random.below(14); i > 0; --i) {
    if (random.below(2) == 0) text += kPieces[random.below(kPieces.size())];
    const uint64_t limits[] = {128, 0x250, 0x3000, 0xD800};
    text::append_utf8(static_cast<char32_t>(random.below(limits[random.below(4)])), text);
    if (random.below(3) == 0) text += ' ';
  }
  return text;
}

void expect_equals_golden(const std::string& folder) {
  const Tokenizer tokenizer = Tokenizer::load(folder);
  const Json golden = read_json_file(folder + "/golden.json");
  ASSERT_GT(golden.size(), 10u);
  for (const Json& item : golden) {
    const auto text = item.at("text").get<std::string>();
    const Ids ids = tokenizer.encode(text);
    EXPECT_EQ(ids, item.at("ids").get<Ids>()) << text;
    std::vector<std::string> tokens;
    for (const int32_t id : ids) tokens.push_back(tokenizer.token(id));
    EXPECT_EQ(tokens, item.at("tokens").get<std::vector<std::string>>()) << text;
    EXPECT_EQ(tokenizer.decode(ids), item.at("decoded").get<std::string>()) << text;
    EXPECT_EQ(tokenizer.decode(ids, true), item.at("decoded_skip_special").get<std::string>()) << text;
  }
}

// Ids and decodings from Hugging Face's tokenizers for OLMoE's own tokenizer, which is too large to carry along.
TEST(Tokenizer, EqualsHuggingFaceOnOlmoe) {
  const char* folder = std::getenv("LIGHTMOE_GOLDEN_TOKENIZER");
  if (folder == nullptr) GTEST_SKIP() << "LIGHTMOE_GOLDEN_TOKENIZER names no folder with tokenizer.json, golden.json";
  expect_equals_golden(folder);
}

// The same for a tokenizer trained here (scripts/check_tokenizer.py --write-golden).
TEST(Tokenizer, EqualsHuggingFaceOnOurOwn) { expect_equals_golden(kSmall); }

TEST(Tokenizer, DecodeGivesBackTheNormalizedText) {
  const Tokenizer tokenizer = Tokenizer::load(std::string(kSmall) + "/tokenizer.json");
  Philox random(1);
  for (int i = 0; i < 2000; ++i) {
    const std::string text = random_text(random);
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text::nfc(text)) << text;
  }
  EXPECT_EQ(tokenizer.vocab_size(), 400);
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"token id 400", "0 to 399"}, [&] { tokenizer.decode({400}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"token id -1"}, [&] { tokenizer.token(-1); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"UTF-8", "byte 2"}, [&] { tokenizer.encode("ab\xff"); }));
}

TEST(Tokenizer, EncodesInManyThreads) {
  const Tokenizer tokenizer = Tokenizer::load(kSmall);
  const std::string text = get_file(std::string(kSmall) + "/text.txt");
  const Ids expected = Tokenizer::load(kSmall).encode(text);
  std::vector<Ids> results(4);
  std::vector<std::thread> threads;
  for (Ids& result : results) threads.emplace_back([&] { result = tokenizer.encode(text); });
  for (std::thread& thread : threads) thread.join();
  for (const Ids& result : results) EXPECT_EQ(result, expected);
}

// The definition of BPE, carried out on strings: join the first occurrence of the pair that stands first in the list.
std::vector<std::string> merged_by_definition(std::vector<std::string> symbols,
                                              const std::vector<std::pair<std::string, std::string>>& merges) {
  while (true) {
    size_t best_rank = merges.size(), best_at = 0;
    for (size_t i = 1; i < symbols.size(); ++i) {
      const auto found = std::find(merges.begin(), merges.end(), std::pair(symbols[i - 1], symbols[i]));
      const auto rank = static_cast<size_t>(found - merges.begin());
      if (rank < best_rank) best_rank = rank, best_at = i;
    }
    if (best_rank == merges.size()) return symbols;
    symbols[best_at - 1] += symbols[best_at];
    symbols.erase(symbols.begin() + static_cast<int64_t>(best_at));
  }
}

void expect_merges_by_definition(const std::string& file, const std::string& letters) {
  const Tokenizer tokenizer = Tokenizer::parse(file, "x");
  std::vector<std::pair<std::string, std::string>> merges;
  const Json json = parse_json(file, "x");
  for (const Json& merge : json.at("model").at("merges")) {
    const auto text = merge.get<std::string>();
    merges.emplace_back(text.substr(0, text.find(' ')), text.substr(text.find(' ') + 1));
  }
  ASSERT_FALSE(merges.empty());
  Philox random(2);
  for (int i = 0; i < 300; ++i) {
    std::string word;
    std::vector<std::string> symbols;
    for (uint64_t n = 1 + random.below(i % 10 == 0 ? 200 : 20); n > 0; --n) {
      word += letters[random.below(letters.size())];
      symbols.emplace_back(1, word.back());
    }
    std::vector<std::string> tokens;
    for (const int32_t id : tokenizer.encode(word)) tokens.push_back(tokenizer.token(id));
    EXPECT_EQ(tokens, merged_by_definition(symbols, merges));
  }
}

TEST(Bpe, EqualsTheDefinition) {
  expect_merges_by_definition(get_file(std::string(kSmall) + "/tokenizer.json"), "aeinrstdhpxo");
  // Runs of one letter: pairs of equal rank overlap, and the leftmost goes first.
  BpeTrainingOptions options;
  options.vocab_size = 264;
  const std::string file = train_bpe({"aaaaaaaaaaaaaaaa aaaaaab aab aab baa bbbbb"}, options);
  expect_merges_by_definition(file, "aaab");
  expect_merges_by_definition(file, "a");
}

TEST(Bpe, LongPiecesAreNotQuadratic) {
  const Tokenizer tokenizer = Tokenizer::load(kSmall);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(std::string(1 << 20, 'e'))), std::string(1 << 20, 'e'));
}

// "hug hug hug pug pug hugs": the pieces are "hug", " hug" x2, " pug" x2, " hugs".
// u-g 6, then h-ug 4, then Ġ-hug 3, then Ġ-p and p-ug tie at 2 (lower ids first), then Ġp-ug 2; Ġhug-s stands once.
TEST(TrainBpe, ByHand) {
  BpeTrainingOptions options;
  options.vocab_size = 300;
  const std::string file = train_bpe({"hug hug hug pug pug hugs"}, options);
  const Json merges = parse_json(file, "x").at("model").at("merges");
  EXPECT_EQ(merges, (Json{"u g", "h ug", "Ġ hug", "Ġ p", "Ġp ug"}));
  const Tokenizer tokenizer = Tokenizer::parse(file, "x");
  EXPECT_EQ(tokenizer.vocab_size(), 256 + 5);
  EXPECT_EQ(tokenizer.encode("hug pug hugs mug"), (Ids{257, 260, 258, 's', ' ', 'm', 256}));
}

TEST(TrainBpe, RepeatsTheFileInTheRepository) {
  BpeTrainingOptions options;
  options.vocab_size = 400;
  options.split_digits = true;
  options.special_tokens = {"<|endoftext|>", "<|padding|>"};
  const std::string text = get_file(std::string(kSmall) + "/text.txt");
  EXPECT_EQ(train_bpe({text}, options), get_file(std::string(kSmall) + "/tokenizer.json"));
  EXPECT_EQ(train_bpe({"a b", "c a b"}, options), train_bpe({"c a b", "a b"}, options));
}

TEST(TrainBpe, SpecialTokensComeFirstAndStayWhole) {
  BpeTrainingOptions options;
  options.vocab_size = 300;
  options.special_tokens = {"<s>", "\u0120x"};  // the second one is also how " x" is written
  const Tokenizer tokenizer = Tokenizer::parse(train_bpe({"<s> x x x x <s>a<s>a<s>a"}, options), "x");
  EXPECT_EQ(tokenizer.token(0), "<s>");
  EXPECT_EQ(tokenizer.encode("<s> x"), (Ids{0, 2 + ' ', 2 + 'x'}));
  EXPECT_EQ(tokenizer.decode({0, 2 + 'x'}, true), "x");
  options.special_tokens = {"a"};
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"\"a\""}, [&] { train_bpe({""}, options); }));
  options.special_tokens = {};
  options.vocab_size = 255;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"255", "256"}, [&] { train_bpe({""}, options); }));
}

TEST(TrainBpe, SplitsDigits) {
  BpeTrainingOptions options;
  options.split_digits = true;
  options.vocab_size = 300;
  const Tokenizer split = Tokenizer::parse(train_bpe({"12 12 12 12"}, options), "x");
  EXPECT_EQ(split.encode("12 12"), (Ids{'1', '2', ' ', '1', '2'}));
  options.split_digits = false;
  EXPECT_EQ(Tokenizer::parse(train_bpe({"12 12 12 12"}, options), "x").encode("12").size(), 1u);
}

}  // namespace
}  // namespace lightmoe
