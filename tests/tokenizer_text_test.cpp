// The parts below the tokenizer: UTF-8, normalization, pre-tokenization, added tokens.

#include "loaders/tokenizer_text.h"

#include <gtest/gtest.h>
#include <utf8proc.h>

#include <cstdlib>

#include "loaders/tokenizer_added.h"
#include "loaders/tokenizer_split.h"
#include "runtime/philox.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

using testing::fails_with;
using Pieces = std::vector<std::string>;

TEST(TokenizerText, Utf8) {
  const std::string valid = "a\u00e9\u20ac\U0001f600\U0010ffff\ud7ff\ue000";
  EXPECT_EQ(text::find_invalid_utf8(valid), std::string::npos);
  EXPECT_EQ(text::replace_invalid_utf8(valid), valid);
  std::string back;
  for (size_t at = 0; at < valid.size();) text::append_utf8(text::next_code_point(valid, at), back);
  EXPECT_EQ(back, valid);
  const std::string r = "\ufffd";
  // Bytes, and one replacement for each maximal subpart (Unicode 15, table 3-8 and neighbours).
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", r + r + r + r + r + r + r + r + "A"},
      {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", r + r + r + r + r + r + r + r + "A"},
      {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", r + r + r + r + r + "A" + r + r + "B"},
      {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", r + r + r + r + "A"},
      {"x\xE2\x82", "x" + r},
      {"\x80", r},
  };
  for (const auto& [bytes, expected] : cases) {
    EXPECT_EQ(text::replace_invalid_utf8(bytes), expected);
    EXPECT_EQ(text::find_invalid_utf8(bytes), bytes[0] == 'x' ? 1u : 0u);
  }
}

std::string nfc_of_library(const std::string& text) {
  utf8proc_uint8_t* out = nullptr;
  const auto length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &out, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::string result(reinterpret_cast<const char*>(out), static_cast<size_t>(length));
  std::free(out);
  return result;
}

TEST(TokenizerText, Nfc) {
  EXPECT_EQ(text::nfc("A\u030a"), "\u00c5");
  EXPECT_EQ(text::nfc("\u212b"), "\u00c5");
  EXPECT_EQ(text::nfc("\u1100\u1161\u11a8"), "\uac01");
  EXPECT_EQ(text::nfc("a\u0300\u0323"), "\u1ea1\u0300");             // sorted by combining class first
  EXPECT_EQ(text::nfc("\u0344\u0958"), "\u0308\u0301\u0915\u093c");  // excluded from composition
  EXPECT_EQ(text::nfc("\ufb01 \u00bd"), "\ufb01 \u00bd");            // compatibility forms stay
  Philox random(3);
  for (int i = 0; i < 5000; ++i) {
    std::string text;
    for (int n = 0; n < 8; ++n) {
      const char32_t bases[] = {'a', 0x300, 0x1100, 0x1160, 0x900, 0x1E00, 0x20D0, 0x1D100};
      text::append_utf8(bases[random.below(8)] + static_cast<char32_t>(random.below(0x70)), text);
    }
    EXPECT_EQ(text::nfc(text), nfc_of_library(text));
  }
  std::string marks = "a";  // sorting neighbour by neighbour would take hours
  for (int i = 0; i < 200'000; ++i) marks += i % 2 == 0 ? "\u0301" : "\u0323";
  EXPECT_EQ(text::nfc(marks).size(), 3 + 2 * 199'999u);
}

TEST(TokenizerText, ByteAlphabet) {
  EXPECT_EQ(text::characters_of_bytes(" a\n\x7f\xad\xff"), "\u0120a\u010a\u0121\u0143\u00ff");
  std::string all;
  for (int b = 0; b < 256; ++b) all += static_cast<char>(b);
  EXPECT_EQ(text::bytes_of_characters(text::characters_of_bytes(all)), all);
  EXPECT_EQ(text::bytes_of_characters("\u0120 "), "\u0120 ");  // a space is no character of the alphabet
}

Pieces split(const std::vector<SplitStep>& steps, const std::string& text) {
  Pieces pieces;
  TextSplitter(steps, "x").split(text, [&](std::string_view piece) { pieces.emplace_back(piece); });
  return pieces;
}
SplitStep byte_level(bool use_regex = true, bool add_prefix_space = false) {
  SplitStep step;
  step.use_regex = use_regex;
  step.add_prefix_space = add_prefix_space;
  return step;
}
SplitStep digits(bool individual) {
  SplitStep step;
  step.kind = SplitStep::Kind::kDigits;
  step.individual_digits = individual;
  return step;
}
SplitStep regex(const std::string& pattern) {
  SplitStep step;
  step.kind = SplitStep::Kind::kRegex;
  step.pattern = pattern;
  return step;
}

TEST(TextSplitter, Gpt2PatternByHand) {
  const auto gpt2 = [](const std::string& text) { return split({byte_level()}, text); };
  EXPECT_EQ(gpt2(""), Pieces{});
  EXPECT_EQ(gpt2("I'll go, she'D 'sit"), (Pieces{"I", "'ll", " go", ",", " she", "'", "D", " '", "sit"}));
  EXPECT_EQ(gpt2("a  b   \n c"), (Pieces{"a", " ", " b", "   \n", " c"}));
  EXPECT_EQ(gpt2("a  "), (Pieces{"a", "  "}));
  EXPECT_EQ(gpt2("a\n\nb \t"), (Pieces{"a", "\n", "\n", "b", " \t"}));
  EXPECT_EQ(gpt2("x1234 56\u00b2\u2167!?"), (Pieces{"x", "1234", " 56\u00b2\u2167", "!?"}));
  EXPECT_EQ(gpt2("na\u00efve\u3000\u3000\u0440"), (Pieces{"na\u00efve", "\u3000", "\u3000", "\u0440"}));
  EXPECT_EQ(gpt2("a\u0301b \u180e"), (Pieces{"a", "\u0301", "b", " \u180e"}));  // marks are no letters, U+180E no space
}

TEST(TextSplitter, Gpt2PatternEqualsPcre2) {
  const std::string pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
  const TextSplitter by_hand({byte_level()}, "x"), by_regex({regex(pattern), byte_level(false)}, "x");
  Philox random(4);
  const std::vector<std::string> common = {" ",      "  ", "'",      "'s",     "'ll",    "\n",     "\t",
                                           "7",      "a",  "Z",      "\u00e9", "\u00a0", "\u3000", "\u0085",
                                           "\u180e", "!",  "\u0301", "\u0663", "\u2028"};
  for (int i = 0; i < 4000; ++i) {
    std::string text;
    for (uint64_t n = random.below(12); n > 0; --n) {
      if (random.below(4) > 0)
        text += common[random.below(common.size())];
      else
        text::append_utf8(static_cast<char32_t>(random.below(0xD800)), text);
    }
    Pieces a, b;
    by_hand.split(text, [&](std::string_view piece) { a.emplace_back(piece); });
    by_regex.split(text, [&](std::string_view piece) { b.emplace_back(piece); });
    EXPECT_EQ(a, b) << text;
  }
}

TEST(TextSplitter, StepsInSequence) {
  EXPECT_EQ(split({digits(true), byte_level()}, "a 12b3"), (Pieces{"a", " ", "1", "2", "b", "3"}));
  EXPECT_EQ(split({digits(false), byte_level()}, "a 12b3"), (Pieces{"a", " ", "12", "b", "3"}));
  EXPECT_EQ(split({byte_level(true, true)}, "a b"), (Pieces{" a", " b"}));
  EXPECT_EQ(split({byte_level(true, true)}, " a"), (Pieces{" a"}));
  EXPECT_EQ(split({byte_level(false)}, "a 12 b"), (Pieces{"a 12 b"}));
  EXPECT_EQ(split({regex(R"(\d{1,3})"), byte_level(false)}, "x12345y"), (Pieces{"x", "123", "45", "y"}));
  EXPECT_EQ(split({regex("(?<=x)y"), byte_level(false)}, "xyy"), (Pieces{"x", "y", "y"}));
  EXPECT_EQ(split({regex("b"), byte_level(false, true)}, "abc"), (Pieces{" a", " b", " c"}));
}

TEST(TextSplitter, RegexesThatMeanSomethingElseAreRefused) {
  for (const char* pattern :
       {R"(\h+)",    R"(\w+)",         R"(\bx)",   R"(a$)",    R"(^a)",     R"(\p{Han})", R"(\p{^L})",
        R"([a&&b])", R"([[:alpha:]])", R"(a{2}+)", R"(a{,3})", R"((?m:a))", R"((?<n>a))", R"((a)\1)",
        R"([\S])",   R"(\x41)",        R"(a\)",    R"([a)",    R"([]a])",   R"(a})"}) {
    EXPECT_TRUE(fails_with(ErrorKind::kInput, {"x: pre_tokenizer", "regex"}, [&] {
      split({regex(pattern), byte_level()}, "a");
    })) << pattern;
  }
  for (const char* pattern : {"a*", "(a", "a|", "*"}) {
    EXPECT_TRUE(fails_with(ErrorKind::kInput, {"regex"}, [&] {
      split({regex(pattern), byte_level()}, "a");
    })) << pattern;
  }
}

TEST(TextSplitter, RegexesHaveLimits) {
  const std::string text = std::string(40, 'a') + "!b";
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"limit"}, [&] { split({regex("(?:a|aa)+b"), byte_level()}, text); }));
}

AddedToken added(int32_t id, const std::string& content) {
  AddedToken token;
  token.id = id;
  token.content = content;
  return token;
}
std::string found(const std::vector<AddedToken>& tokens, const std::string& text) {
  std::vector<std::string> contents;
  for (const AddedToken& token : tokens) contents.push_back(token.content);
  std::string out;
  for (const auto& span : AddedTokenFinder(tokens, contents, false).find(text)) {
    out += span.id < 0 ? "(" + std::string(span.text) + ")" : fmt::format("{}[{}]", span.id, span.text);
  }
  return out;
}

TEST(AddedTokens, LongestFirstWithoutOverlap) {
  const std::vector<AddedToken> tokens = {added(1, "ab"), added(2, "abcd"), added(3, "  "), added(4, "   "),
                                          added(5, "\u00e9")};
  EXPECT_EQ(found(tokens, ""), "");
  EXPECT_EQ(found(tokens, "xabcdabcx"), "(x)2[abcd]1[ab](cx)");
  EXPECT_EQ(found(tokens, "a    b"), "(a)4[   ]( b)");
  EXPECT_EQ(found(tokens, "\u00e8\u00e9"), "(\u00e8)5[\u00e9]");
}

TEST(AddedTokens, Flags) {
  AddedToken left = added(1, "<l>"), right = added(2, "<r>"), word = added(3, "foo"), normalized = added(4, "x");
  left.lstrip = true;
  right.rstrip = true;
  word.single_word = true;
  normalized.normalized = true;  // looked for by another finder
  const std::vector<AddedToken> tokens = {left, right, word, normalized, added(5, "  ")};
  EXPECT_EQ(found(tokens, "a \u3000<l> b"), "(a)1[ \u3000<l>]( b)");
  EXPECT_EQ(found(tokens, "a <r> \nb"), "(a )2[<r> \n](b)");
  EXPECT_EQ(found(tokens, "<r> <l>"), "2[<r> ]1[<l>]");  // white space goes to the first
  EXPECT_EQ(found(tokens, "foo,foo_ \u00e9foo foo"), "3[foo](,foo_ \u00e9foo )3[foo]");
  EXPECT_EQ(found(tokens, "x"), "(x)");
  EXPECT_EQ(found(tokens, "<r>   y"), "2[<r>   ]5[  ]( y)");  // as Hugging Face: found again inside, and its rest
}

}  // namespace
}  // namespace lightmoe
