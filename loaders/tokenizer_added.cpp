#include "loaders/tokenizer_added.h"

#include <algorithm>

#include "loaders/tokenizer_text.h"

namespace lightmoe {
namespace {

// Start of the last character before `at`.
size_t previous(std::string_view text, size_t at) {
  do --at;
  while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80);
  return at;
}

bool word_before(std::string_view text, size_t at) {
  if (at == 0) return false;
  size_t start = previous(text, at);
  return text::is_word(text::next_code_point(text, start));
}

bool word_after(std::string_view text, size_t at) {
  return at < text.size() && text::is_word(text::next_code_point(text, at));
}

size_t skip_space_before(std::string_view text, size_t at) {
  while (at > 0) {
    const size_t start = previous(text, at);
    size_t next = start;
    if (!text::is_space(text::next_code_point(text, next))) break;
    at = start;
  }
  return at;
}

size_t skip_space_after(std::string_view text, size_t at) {
  while (at < text.size()) {
    size_t next = at;
    if (!text::is_space(text::next_code_point(text, next))) break;
    at = next;
  }
  return at;
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(const std::vector<AddedToken>& tokens, const std::vector<std::string>& contents,
                                   bool normalized)
    : token_of_node_(1, -1) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i].normalized != normalized || contents[i].empty()) continue;
    uint32_t node = 0;
    for (const char c : contents[i]) {
      const auto byte = static_cast<uint8_t>(c);
      uint32_t& child = node == 0 ? roots_[byte] : children_[uint64_t{node} << 8 | byte];
      if (child == 0) {
        child = static_cast<uint32_t>(token_of_node_.size());
        token_of_node_.push_back(-1);
      }
      node = child;
    }
    // Two contents may normalize to the same string: the special one wins, then the first.
    int32_t& owner = token_of_node_[node];
    if (owner < 0 || (tokens[i].special && !tokens_[static_cast<size_t>(owner)].special)) {
      owner = static_cast<int32_t>(tokens_.size());
    }
    tokens_.push_back(tokens[i]);
  }
}

AddedTokenFinder::Match AddedTokenFinder::match_at(std::string_view text, size_t at) const {
  Match match;
  uint32_t node = roots_[static_cast<uint8_t>(text[at])];
  while (node != 0) {
    ++at;
    if (token_of_node_[node] >= 0) match = {at, &tokens_[static_cast<size_t>(token_of_node_[node])]};
    if (at == text.size()) break;
    const auto child = children_.find(uint64_t{node} << 8 | static_cast<uint8_t>(text[at]));
    node = child == children_.end() ? 0 : child->second;
  }
  return match;
}

// NOTE: a token with rstrip takes white space in which another token may start; that one is still found, so spans can overlap.
// Hugging Face's tokenizers does the same.
std::vector<AddedTokenFinder::Span> AddedTokenFinder::find(std::string_view text) const {
  std::vector<Span> spans;
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    const Match match = match_at(text, at);
    if (match.token == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at, end = match.end;
    at = match.end;
    if (match.token->single_word && (word_before(text, begin) || word_after(text, end))) continue;
    if (match.token->lstrip) begin = std::min(std::max(skip_space_before(text, begin), done), end);
    if (match.token->rstrip) end = skip_space_after(text, end);
    if (begin > done) spans.push_back({text.substr(done, begin - done), -1});
    spans.push_back({text.substr(begin, end - begin), match.token->id});
    done = end;
  }
  if (done < text.size()) spans.push_back({text.substr(done), -1});
  return spans;
}

}  // namespace lightmoe
