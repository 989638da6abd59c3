// Oniguruma's Ruby syntax into PCRE2's, for the constructs that tokenizers use.

#include "loaders/tokenizer_split.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

// White_Space of Unicode. PCRE2's own \s has U+180E too, which Oniguruma's has not.
constexpr const char* kSpaces =
    R"( \t-\r\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";

class Translator {
 public:
  Translator(std::string_view pattern, const std::string& name) : pattern_(pattern), name_(name) {}

  std::string run() {
    while (at_ < pattern_.size()) {
      const char c = pattern_[at_];
      if (c == '\\')
        escape(false);
      else if (c == '[')
        bracket();
      else if (c == '(')
        group();
      else if (c == '{')
        interval();
      else if (c == '^' || c == '$' || c == '}')
        refuse(1);
      else
        copy(1);
    }
    return out_;
  }

 private:
  [[noreturn]] void refuse(size_t length) const {
    fail(ErrorKind::kInput, "{}: regex {}: \"{}\" at character {} is not supported", name_, printable(pattern_),
         printable(pattern_.substr(at_, length)), at_ + 1);
  }
  char peek(size_t ahead) const { return at_ + ahead < pattern_.size() ? pattern_[at_ + ahead] : '\0'; }
  bool starts(std::string_view prefix) const { return pattern_.substr(at_).starts_with(prefix); }
  void copy(size_t length) {
    out_ += pattern_.substr(at_, length);
    at_ += length;
  }
  void replace(size_t length, const std::string& by) {
    out_ += by;
    at_ += length;
  }

  void escape(bool in_class) {
    const char c = peek(1);
    if (c == 'p' || c == 'P') return property();
    if (c == 's') return replace(2, in_class ? kSpaces : fmt::format("[{}]", kSpaces));
    if (c == 'S' && !in_class) return replace(2, fmt::format("[^{}]", kSpaces));
    if (c == 'd') return replace(2, R"(\p{Nd})");
    if (c == 'D') return replace(2, R"(\P{Nd})");
    const bool plain = c == 'r' || c == 'n' || c == 't' || c == 'f' ||
                       std::string_view("\\|()[]{}^$*+?.-/'\"# ").find(c) != std::string_view::npos;
    if (c == '\0' || !plain) refuse(2);
    copy(2);
  }

  // General categories only: \p{L}, \P{Nd}. Scripts mean script extensions in PCRE2.
  void property() {
    const size_t end = pattern_.find('}', at_);
    if (peek(2) != '{' || end == std::string_view::npos) refuse(3);
    const std::string_view category = pattern_.substr(at_ + 3, end - at_ - 3);
    const bool known = !category.empty() && category.size() <= 2 &&
                       std::string_view("LMNPSZC").find(category[0]) != std::string_view::npos &&
                       (category.size() == 1 || (category[1] >= 'a' && category[1] <= 'z'));
    if (!known) refuse(end + 1 - at_);
    copy(end + 1 - at_);
  }

  void bracket() {
    copy(peek(1) == '^' ? 2 : 1);
    if (peek(0) == ']') refuse(1);
    while (at_ < pattern_.size() && pattern_[at_] != ']') {
      if (starts("[") || starts("&&")) refuse(2);
      if (pattern_[at_] == '\\')
        escape(true);
      else
        copy(1);
    }
    if (at_ == pattern_.size()) refuse(0);
    copy(1);
  }

  void group() {
    if (peek(1) != '?') return copy(1);
    for (const std::string_view opening : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"}) {
      if (starts(opening)) return copy(opening.size());
    }
    refuse(4);
  }

  // {n} {n,} {n,m}. NOTE: {n}+ repeats in Ruby and is possessive in PCRE2; {n}? differs too.
  void interval() {
    size_t length = 1;
    const auto digits = [&] {
      const size_t from = length;
      while (peek(length) >= '0' && peek(length) <= '9') ++length;
      return length > from;
    };
    const bool counted = digits();
    if (peek(length) == ',') {
      ++length;
      digits();
    }
    if (!counted || peek(length) != '}' || peek(length + 1) == '+' || peek(length + 1) == '?') refuse(length + 2);
    copy(length + 1);
  }

  std::string_view pattern_;
  const std::string& name_;
  size_t at_ = 0;
  std::string out_;
};

}  // namespace

std::string translate_pattern(std::string_view pattern, const std::string& name) {
  return Translator(pattern, name).run();
}

}  // namespace lightmoe
