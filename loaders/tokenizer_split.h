#pragma once
// Pre-tokenization: text into the pieces that BPE works on. The steps of tokenizer.json in order, each on every piece of the
// one before it:
//   Digits     runs of numbers apart from the rest, or every number alone (individual_digits)
//   Split      matches of a regex, and what lies between them, each alone ("Isolated")
//   ByteLevel  a space before each piece that has none (add_prefix_space), then GPT-2's pattern (use_regex):
//                's 't 're 've 'm 'll 'd | ?L+ | ?N+ | ?[^sLN]+ | s+ not before a non-space | s+     (L letter, N number, s space)
// GPT-2's pattern is matched by hand. Regexes of Split are written for Oniguruma (Ruby syntax) and run by PCRE2: the common
// subset is translated, a construct that means something else there is refused. PCRE2 runs with limits on steps and memory.

#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "loaders/tokenizer_file.h"

namespace lightmoe {

class TextSplitter {
 public:
  using Emit = std::function<void(std::string_view)>;

  TextSplitter(const std::vector<SplitStep>& steps, const std::string& name);
  ~TextSplitter();
  TextSplitter(TextSplitter&&) noexcept;
  // Calls emit with the pieces of valid UTF-8 text, in order, none empty. Their concatenation is text, but for prefix spaces.
  void split(std::string_view text, const Emit& emit) const;

 private:
  class Regex;
  struct Step {
    SplitStep step;
    std::unique_ptr<Regex> regex;
  };
  void run(size_t step, std::string_view text, const Emit& emit) const;
  std::vector<Step> steps_;
};

// GPT-2's pattern: end of the piece that starts at `at`.
size_t gpt2_piece_end(std::string_view text, size_t at);
// A Split pattern in PCRE2's syntax with the same meaning. Error(kInput) naming the construct otherwise.
std::string translate_pattern(std::string_view pattern, const std::string& name);

}  // namespace lightmoe
