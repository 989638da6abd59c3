#pragma once
// Records as evaluation reads them, and the small text measures its metrics are defined by.

#include <cstdint>
#include <string>
#include <string_view>

#include "model/eval_score.h"

namespace lightmoe {

std::string_view trimmed(std::string_view text);  // without ASCII white space at both ends
int64_t count_characters(std::string_view utf8);  // code points
int64_t count_words(std::string_view utf8);  // runs of Unicode white space + 1, as Python's len(re.split(r"\s+", text))

// The parts before the last one the loss falls on, and that one. Multiple choice: all parts, and the right choice.
struct Question {
  std::string context, answer;
};
Question question_of(const TextRecord& record);
std::string text_of(const TextRecord& record);  // all parts

// ids of context + continuation with labels on the continuation, by lm-evaluation-harness's rule (eval.h). An empty context
// becomes `prefix`. Error(kInput) naming `what` when the continuation has no token of its own, or nothing stands before it.
ScoredSequence continuation_sequence(const Question& question, const Tokenizer& tokenizer, int32_t prefix,
                                     const std::string& what);

}  // namespace lightmoe
