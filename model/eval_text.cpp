#include "model/eval_text.h"

#include <algorithm>

#include "kernels/labels.h"

namespace lightmoe {
namespace {

constexpr std::string_view kAsciiSpace = " \t\n\v\f\r";

bool continues_character(char byte) { return (static_cast<unsigned char>(byte) & 0xc0) == 0x80; }

// Code point that starts at text[at]; the text is valid UTF-8 (the JSON reader saw to that).
uint32_t code_point(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const uint32_t lead = byte(at);
  if (lead < 0x80) return lead;
  if (lead < 0xe0) return (lead & 0x1f) << 6 | (byte(at + 1) & 0x3f);
  if (lead < 0xf0) return (lead & 0x0f) << 12 | (byte(at + 1) & 0x3f) << 6 | (byte(at + 2) & 0x3f);
  return 0x10000;  // no white space up there
}

// Python's \s for str.
bool is_space(uint32_t c) {
  return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

}  // namespace

std::string_view trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(kAsciiSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kAsciiSpace) - begin + 1);
}

int64_t count_characters(std::string_view utf8) {
  return std::count_if(utf8.begin(), utf8.end(), [](char byte) { return !continues_character(byte); });
}

int64_t count_words(std::string_view utf8) {
  int64_t runs = 0;
  bool in_run = false;
  for (size_t i = 0; i < utf8.size(); ++i) {
    if (continues_character(utf8[i])) continue;
    const bool space = is_space(code_point(utf8, i));
    runs += space && !in_run;
    in_run = space;
  }
  return runs + 1;
}

Question question_of(const TextRecord& record) {
  Question question;
  if (!record.choices.empty()) {
    return {.context = text_of(record), .answer = record.choices[static_cast<size_t>(record.answer)]};
  }
  size_t last = record.parts.size();
  for (size_t i = 0; i < record.parts.size(); ++i) {
    if (record.parts[i].loss) last = i;
  }
  for (size_t i = 0; i < last; ++i) question.context += record.parts[i].text;
  if (last < record.parts.size()) question.answer = record.parts[last].text;
  return question;
}

std::string text_of(const TextRecord& record) {
  std::string text;
  for (const TextRecord::Part& part : record.parts) text += part.text;
  return text;
}

ScoredSequence continuation_sequence(const Question& question, const Tokenizer& tokenizer, int32_t prefix,
                                     const std::string& what) {
  std::string context = question.context, continuation = question.answer;
  const size_t kept = context.find_last_not_of(kAsciiSpace) + 1;  // npos + 1 = 0
  continuation.insert(0, context, kept, std::string::npos);
  context.resize(kept);
  std::vector<int32_t> ids = tokenizer.encode(context + continuation);
  size_t given = tokenizer.encode(context).size();
  if (given == 0 && prefix >= 0) {
    ids.insert(ids.begin(), prefix);
    given = 1;
  }
  check(given > 0, ErrorKind::kInput, "{}: nothing stands before the answer, and the model has no BOS or EOS id", what);
  check(ids.size() > given, ErrorKind::kInput, "{}: the answer '{}' has no token of its own", what, question.answer);
  ScoredSequence sequence{.ids = {ids.begin(), ids.end() - 1}, .labels = {ids.begin() + 1, ids.end()}};
  std::fill(sequence.labels.begin(), sequence.labels.begin() + static_cast<int64_t>(given) - 1, kIgnoredLabel);
  return sequence;
}

}  // namespace lightmoe
