#pragma once
// Added tokens: whole strings that are found in the text before anything else is done to it. At each place the longest token
// that starts there is taken, from left to right, without overlap.

#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "loaders/tokenizer_file.h"

namespace lightmoe {

class AddedTokenFinder {
 public:
  // The tokens with .normalized == normalized; `contents` [i] is what to look for instead of tokens[i].content.
  AddedTokenFinder(const std::vector<AddedToken>& tokens, const std::vector<std::string>& contents, bool normalized);

  struct Span {
    std::string_view text;
    int32_t id;  // -1: plain text
  };
  std::vector<Span> find(std::string_view text) const;

 private:
  struct Match {
    size_t end = 0;
    const AddedToken* token = nullptr;
  };
  Match match_at(std::string_view text, size_t at) const;

  // A trie of bytes: the children of the root in a table, those of the other nodes in one hash map.
  std::vector<AddedToken> tokens_;
  std::array<uint32_t, 256> roots_{};
  std::unordered_map<uint64_t, uint32_t> children_;  // node << 8 | byte -> node
  std::vector<int32_t> token_of_node_;               // index into tokens_ or -1
};

}  // namespace lightmoe
