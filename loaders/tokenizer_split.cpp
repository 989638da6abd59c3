#define PCRE2_CODE_UNIT_WIDTH 8
#include "loaders/tokenizer_split.h"

#include <pcre2.h>

#include "loaders/tokenizer_text.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr uint32_t kMatchLimit = 1'000'000;  // backtracking steps of one match
constexpr uint32_t kHeapLimitKiB = 64 << 10;
constexpr size_t kMaxPatternBytes = 16 << 10;

struct FreePcre {
  void operator()(pcre2_code* p) const { pcre2_code_free(p); }
  void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
  void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
  void operator()(pcre2_compile_context* p) const { pcre2_compile_context_free(p); }
};
template <class T>
using PcrePtr = std::unique_ptr<T, FreePcre>;

std::string pcre_message(int code) {
  PCRE2_UCHAR buffer[256] = {};
  pcre2_get_error_message(code, buffer, sizeof buffer);
  return reinterpret_cast<const char*>(buffer);
}

enum class CharClass : uint8_t { kLetter, kNumber, kSpace, kOther };

CharClass class_of(char32_t c) {
  if (text::is_letter(c)) return CharClass::kLetter;
  if (text::is_number(c)) return CharClass::kNumber;
  return text::is_space(c) ? CharClass::kSpace : CharClass::kOther;
}

// End of the run of class `wanted` that starts at `at`; *last becomes the start of its last character.
size_t run_end(std::string_view text, size_t at, CharClass wanted, size_t* last = nullptr) {
  while (at < text.size()) {
    size_t next = at;
    if (class_of(text::next_code_point(text, next)) != wanted) break;
    if (last != nullptr) *last = at;
    at = next;
  }
  return at;
}

void split_digits(std::string_view text, bool individual, const TextSplitter::Emit& emit) {
  size_t begin = 0;
  bool in_number = false;
  for (size_t at = 0; at < text.size();) {
    size_t next = at;
    const bool number = text::is_number(text::next_code_point(text, next));
    const bool border = number != in_number || (number && individual);
    if (border && at > begin) {
      emit(text.substr(begin, at - begin));
      begin = at;
    }
    in_number = number;
    at = next;
  }
  if (begin < text.size()) emit(text.substr(begin));
}

}  // namespace

class TextSplitter::Regex {
 public:
  Regex(const std::string& pattern, const std::string& name)
      : name_(name), context_(pcre2_match_context_create(nullptr)) {
    check(pattern.size() <= kMaxPatternBytes, ErrorKind::kInput, "{}: regex of {} bytes, at most {} accepted", name,
          pattern.size(), kMaxPatternBytes);
    const std::string translated = translate_pattern(pattern, name);
    const PcrePtr<pcre2_compile_context> compile(pcre2_compile_context_create(nullptr));
    pcre2_set_newline(compile.get(), PCRE2_NEWLINE_LF);
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, compile.get()));
    check(code_ != nullptr, ErrorKind::kInput, "{}: regex {}: {}", name, printable(pattern), pcre_message(error));
    uint32_t may_be_empty = 0;
    pcre2_pattern_info(code_.get(), PCRE2_INFO_MATCHEMPTY, &may_be_empty);
    check(may_be_empty == 0, ErrorKind::kInput, "{}: regex {} can match nothing", name, printable(pattern));
    pcre2_set_match_limit(context_.get(), kMatchLimit);
    pcre2_set_heap_limit(context_.get(), kHeapLimitKiB);
  }

  void split(std::string_view text, const Emit& emit) const {
    const PcrePtr<pcre2_match_data> match(pcre2_match_data_create_from_pattern(code_.get(), nullptr));
    size_t done = 0;
    while (done < text.size()) {
      // NOTE: the start offset, not a substring, so that look-behind sees the text before.
      const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), done,
                                    PCRE2_NO_UTF_CHECK, match.get(), context_.get());
      if (found == PCRE2_ERROR_NOMATCH) break;
      check(found >= 0, ErrorKind::kInput, "{}: regex at byte {} of a text of {}: {}", name_, done, text.size(),
            pcre_message(found));
      const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
      if (range[0] > done) emit(text.substr(done, range[0] - done));
      emit(text.substr(range[0], range[1] - range[0]));
      done = range[1];
    }
    if (done < text.size()) emit(text.substr(done));
  }

 private:
  std::string name_;
  PcrePtr<pcre2_match_context> context_;
  PcrePtr<pcre2_code> code_;
};

size_t gpt2_piece_end(std::string_view text, size_t at) {
  if (text[at] == '\'') {
    const std::string_view rest = text.substr(at);
    for (const std::string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
      if (rest.starts_with(ending)) return at + ending.size();
    }
  }
  const size_t word = at + (text[at] == ' ' && at + 1 < text.size() ? 1 : 0);
  size_t next = word;
  const CharClass kind = class_of(text::next_code_point(text, next));
  if (kind != CharClass::kSpace) return run_end(text, next, kind);
  // White space: all of it at the end of the text, else all but its last character, which belongs to what follows.
  size_t last = at;
  const size_t end = run_end(text, at, CharClass::kSpace, &last);
  return end == text.size() || last == at ? end : last;
}

TextSplitter::TextSplitter(const std::vector<SplitStep>& steps, const std::string& name) {
  for (const SplitStep& step : steps) {
    std::unique_ptr<Regex> regex;
    if (step.kind == SplitStep::Kind::kRegex) regex = std::make_unique<Regex>(step.pattern, name + ": pre_tokenizer");
    steps_.push_back({step, std::move(regex)});
  }
}
TextSplitter::~TextSplitter() = default;
TextSplitter::TextSplitter(TextSplitter&&) noexcept = default;

void TextSplitter::split(std::string_view text, const Emit& emit) const {
  if (!text.empty()) run(0, text, emit);
}

void TextSplitter::run(size_t index, std::string_view text, const Emit& emit) const {
  if (index == steps_.size()) return emit(text);
  const auto& [step, regex] = steps_[index];
  if (step.kind != SplitStep::Kind::kByteLevel) {
    const Emit deeper = [&](std::string_view piece) { run(index + 1, piece, emit); };
    if (regex)
      regex->split(text, deeper);
    else
      split_digits(text, step.individual_digits, deeper);
    return;
  }
  std::string prefixed;
  if (step.add_prefix_space && text[0] != ' ') {
    prefixed = " ";
    prefixed += text;
    text = prefixed;
  }
  if (!step.use_regex) return run(index + 1, text, emit);
  for (size_t at = 0; at < text.size();) {
    const size_t end = gpt2_piece_end(text, at);
    run(index + 1, text.substr(at, end - at), emit);
    at = end;
  }
}

}  // namespace lightmoe
