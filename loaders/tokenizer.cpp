#include "loaders/tokenizer.h"

#include "loaders/bpe.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "loaders/tokenizer_added.h"
#include "loaders/tokenizer_file.h"
#include "loaders/tokenizer_split.h"
#include "loaders/tokenizer_text.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr int64_t kMaxFileBytes = int64_t{64} << 20;
constexpr size_t kMaxTextBytes = size_t{1} << 30;

std::vector<std::string> contents_of(const TokenizerFile& file, bool normalize) {
  std::vector<std::string> contents;
  for (const AddedToken& token : file.added) {
    contents.push_back(normalize && file.nfc ? text::nfc(token.content) : token.content);
  }
  return contents;
}

}  // namespace

struct Tokenizer::State {
  explicit State(TokenizerFile f)
      : name(f.name),
        nfc(f.nfc),
        raw_tokens(f.added, contents_of(f, false), false),
        normalized_tokens(f.added, contents_of(f, true), true),
        splitter(f.steps, f.name),
        bpe(f.tokens, f.merges, f.name),
        tokens(std::move(f.tokens)),
        special(tokens.size(), false) {
    bytes.reserve(tokens.size());
    for (const std::string& token : tokens) bytes.push_back(text::bytes_of_characters(token));
    for (const AddedToken& token : f.added) special[static_cast<size_t>(token.id)] = token.special;
  }

  // Text without unnormalized added tokens.
  void encode_plain(std::string_view plain, std::vector<int32_t>& ids) const {
    const std::string normal = nfc ? text::nfc(plain) : std::string(plain);
    for (const AddedTokenFinder::Span& span : normalized_tokens.find(normal)) {
      if (span.id >= 0)
        ids.push_back(span.id);
      else
        splitter.split(span.text, [&](std::string_view piece) { bpe.encode(piece, ids); });
    }
  }

  const std::string& token(int32_t id) const {
    const bool known = id >= 0 && static_cast<size_t>(id) < tokens.size() && !tokens[static_cast<size_t>(id)].empty();
    check(known, ErrorKind::kInput, "{}: token id {} does not exist, ids go from 0 to {}", name, id,
          static_cast<int64_t>(tokens.size()) - 1);
    return tokens[static_cast<size_t>(id)];
  }

  std::string name;
  bool nfc;
  AddedTokenFinder raw_tokens, normalized_tokens;
  TextSplitter splitter;
  BpeModel bpe;
  std::vector<std::string> tokens;  // by id
  std::vector<std::string> bytes;   // what each token decodes to
  std::vector<bool> special;
};

Tokenizer::Tokenizer() = default;
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  const std::filesystem::path file = std::filesystem::is_directory(path) ? path / "tokenizer.json" : path;
  return parse(read_file(file, kMaxFileBytes), file.string());
}

Tokenizer Tokenizer::parse(std::string_view json, const std::string& name) {
  Tokenizer tokenizer;
  tokenizer.state_ = std::make_unique<State>(parse_tokenizer(parse_json(json, name), name));
  return tokenizer;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  const size_t invalid = text::find_invalid_utf8(text);
  check(invalid == std::string_view::npos, ErrorKind::kInput, "text is not UTF-8 at byte {}", invalid);
  check(text.size() <= kMaxTextBytes, ErrorKind::kInput, "text of {} bytes, at most {} can be tokenized at once",
        text.size(), kMaxTextBytes);
  std::vector<int32_t> ids;
  for (const AddedTokenFinder::Span& span : state_->raw_tokens.find(text)) {
    if (span.id >= 0)
      ids.push_back(span.id);
    else
      state_->encode_plain(span.text, ids);
  }
  return ids;
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids, bool skip_special_tokens) const {
  std::string bytes;
  for (const int32_t id : ids) {
    state_->token(id);
    const auto i = static_cast<size_t>(id);
    if (!skip_special_tokens || !state_->special[i]) bytes += state_->bytes[i];
  }
  return text::replace_invalid_utf8(bytes);
}

std::string Tokenizer::token(int32_t id) const { return state_->token(id); }
int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(state_->tokens.size()); }

}  // namespace lightmoe
