#pragma once
// tokenizer.json read into plain values. Everything in the file is either understood or refused by
// name: an unknown piece, option or key is Error(kInput) "FILE: where: what". No behaviour here.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "loaders/json_type.h"

namespace lightmoe {

struct AddedToken {
  int32_t id = -1;
  std::string content;
  bool special = false;      // decode leaves it out when asked
  bool normalized = false;   // looked for after the normalizer, and itself normalized
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space after it
};

// One step that cuts a piece of text into smaller ones. ByteLevel is always the last step.
struct SplitStep {
  enum class Kind : uint8_t { kRegex, kDigits, kByteLevel };
  Kind kind = Kind::kByteLevel;
  std::string pattern;             // kRegex
  bool individual_digits = false;  // kDigits
  bool use_regex = true;           // kByteLevel
  bool add_prefix_space = false;   // kByteLevel
};

struct TokenizerFile {
  std::string name;  // for messages
  std::vector<AddedToken> added;
  bool nfc = false;
  std::vector<SplitStep> steps;
  std::vector<std::string> tokens;                          // by id; ids nobody has are empty strings
  std::vector<std::pair<std::string, std::string>> merges;  // by rank
};

TokenizerFile parse_tokenizer(const Json& json, const std::string& name);

}  // namespace lightmoe
