#pragma once
// tokenizer.json (Hugging Face tokenizers): byte-level BPE as GPT-NeoX and OLMoE use it. Added tokens are matched first, longest
// first; then the normalizer (none or NFC); the ByteLevel pre-tokenizer (use_regex, add_prefix_space honoured) or a Split by a
// regex; BPE with merges given as "a b" strings or as pairs. Any other piece is refused by name with Error(kInput), never guessed.
// Ids of special tokens come from config files, never from names.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace lightmoe {

class Tokenizer {
 public:
  // A tokenizer.json file, or a directory that holds one.
  static Tokenizer load(const std::filesystem::path& path);
  // The text of a tokenizer.json; `name` starts the message of every error.
  static Tokenizer parse(std::string_view json, const std::string& name);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;

  // text must be valid UTF-8 (Error(kInput) with the byte offset otherwise). No special tokens are added.
  std::vector<int32_t> encode(std::string_view text) const;
  // Bytes that are not valid UTF-8 become U+FFFD, as in Hugging Face. Unknown ids throw Error(kInput).
  std::string decode(const std::vector<int32_t>& ids, bool skip_special_tokens = false) const;
  std::string token(int32_t id) const;  // as written in the file
  int64_t vocab_size() const;           // highest id + 1, added tokens included

 private:
  Tokenizer();
  struct State;
  std::unique_ptr<State> state_;
};

// Byte-level BPE trained on text (the demo's tokenizer): Sennrich et al. 2016 over GPT-2 pieces, digits one by one when asked.
// Returns a tokenizer.json that Tokenizer::load and Hugging Face both read. Ids: special tokens, the 256 bytes in order, merges.
// The most frequent pair first, ties to the lower ids; pairs seen once are not merged, so a small text gives fewer tokens.
struct BpeTrainingOptions {
  int64_t vocab_size = 1024;
  std::vector<std::string> special_tokens;  // take the first ids
  bool split_digits = false;
};
std::string train_bpe(const std::vector<std::string>& texts, const BpeTrainingOptions& options);

}  // namespace lightmoe
