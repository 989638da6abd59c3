#include <algorithm>
#include <map>
#include <queue>
#include <tuple>
#include <unordered_map>

#include "loaders/json.h"
#include "loaders/tokenizer.h"
#include "loaders/tokenizer_added.h"
#include "loaders/tokenizer_split.h"
#include "loaders/tokenizer_text.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

using Pair = std::pair<int32_t, int32_t>;

struct PairHash {
  size_t operator()(const Pair& p) const {
    return std::hash<uint64_t>{}(uint64_t{static_cast<uint32_t>(p.first)} << 32 | static_cast<uint32_t>(p.second));
  }
};

struct Word {
  std::vector<int32_t> symbols;
  int64_t count;
};

// The pieces of all texts with their counts, in the order of their bytes.
std::map<std::string, int64_t> count_pieces(const std::vector<std::string>& texts,
                                            const std::vector<AddedToken>& special,
                                            const std::vector<SplitStep>& steps) {
  std::vector<std::string> contents;
  for (const AddedToken& token : special) contents.push_back(token.content);
  const AddedTokenFinder finder(special, contents, false);
  const TextSplitter splitter(steps, "train_bpe");
  std::unordered_map<std::string, int64_t> counts;
  for (size_t i = 0; i < texts.size(); ++i) {
    const size_t invalid = text::find_invalid_utf8(texts[i]);
    check(invalid == std::string::npos, ErrorKind::kInput, "text {} is not UTF-8 at byte {}", i, invalid);
    for (const AddedTokenFinder::Span& span : finder.find(texts[i])) {
      if (span.id >= 0) continue;
      splitter.split(text::nfc(span.text), [&](std::string_view piece) { ++counts[std::string(piece)]; });
    }
  }
  return {counts.begin(), counts.end()};
}

class Trainer {
 public:
  Trainer(const std::map<std::string, int64_t>& pieces, const std::vector<AddedToken>& special) {
    for (const AddedToken& token : special) add_token(token.content);
    num_special_ = tokens_.size();
    for (int b = 0; b < 256; ++b) add_token(text::characters_of_bytes(std::string(1, static_cast<char>(b))));
    for (const auto& [piece, count] : pieces) {
      Word word{{}, count};
      for (const char c : piece) word.symbols.push_back(static_cast<int32_t>(num_special_) + static_cast<uint8_t>(c));
      words_.push_back(std::move(word));
      const auto index = static_cast<int32_t>(words_.size()) - 1;
      for_each_pair(words_.back(), [&](const Pair& pair) {
        add_to_pair(pair, words_.back().count);
        words_of_[pair].push_back(index);
      });
    }
    for (const auto& [pair, count] : counts_) queue_.push({count, pair});
  }

  void run(size_t vocab_size) {
    while (tokens_.size() < vocab_size && !queue_.empty()) {
      const Entry best = queue_.top();
      queue_.pop();
      const int64_t now = counts_[best.pair];
      if (now != best.count) {
        if (now >= kMinCount) queue_.push({now, best.pair});
        continue;
      }
      if (best.count < kMinCount) break;
      merge(best.pair);
    }
  }

  const std::vector<std::string>& tokens() const { return tokens_; }
  const std::vector<Pair>& merges() const { return merges_; }

 private:
  static constexpr int64_t kMinCount = 2;
  struct Entry {
    int64_t count;
    Pair pair;
    // Top of the queue: the highest count, then the lowest ids, so that the result is unique.
    bool operator<(const Entry& o) const { return std::tie(count, o.pair) < std::tie(o.count, pair); }
  };

  int32_t add_token(const std::string& token) {
    const auto id = static_cast<int32_t>(tokens_.size());
    const bool is_new = ids_.emplace(token, id).second;
    check(is_new, ErrorKind::kUsage, "special token \"{}\" is given twice or equals the token of a byte",
          printable(token));
    tokens_.push_back(token);
    return id;
  }

  template <class F>
  static void for_each_pair(const Word& word, F&& f) {
    for (size_t i = 1; i < word.symbols.size(); ++i) f(Pair(word.symbols[i - 1], word.symbols[i]));
  }

  void add_to_pair(const Pair& pair, int64_t count) { counts_[pair] += count; }

  void merge(const Pair& pair) {
    const std::string joined = tokens_[static_cast<size_t>(pair.first)] + tokens_[static_cast<size_t>(pair.second)];
    const auto known = ids_.find(joined);
    if (known != ids_.end() && static_cast<size_t>(known->second) < num_special_) return;
    // Two pairs can spell the same token: it keeps its id.
    const int32_t id = known != ids_.end() ? known->second : add_token(joined);
    merges_.push_back(pair);
    std::vector<int32_t> where = std::move(words_of_[pair]);
    std::sort(where.begin(), where.end());
    where.erase(std::unique(where.begin(), where.end()), where.end());
    std::vector<Pair> changed;
    for (const int32_t index : where) {
      Word& word = words_[static_cast<size_t>(index)];
      for_each_pair(word, [&](const Pair& p) { add_to_pair(p, -word.count); });
      join(word.symbols, pair, id);
      for_each_pair(word, [&](const Pair& p) {
        add_to_pair(p, word.count);
        if (p.first != id && p.second != id) return;
        words_of_[p].push_back(index);
        changed.push_back(p);
      });
    }
    std::sort(changed.begin(), changed.end());
    changed.erase(std::unique(changed.begin(), changed.end()), changed.end());
    for (const Pair& p : changed) queue_.push({counts_[p], p});
  }

  static void join(std::vector<int32_t>& symbols, const Pair& pair, int32_t id) {
    size_t out = 0;
    for (size_t i = 0; i < symbols.size(); ++i, ++out) {
      const bool here = i + 1 < symbols.size() && symbols[i] == pair.first && symbols[i + 1] == pair.second;
      symbols[out] = here ? id : symbols[i];
      if (here) ++i;
    }
    symbols.resize(out);
  }

  std::vector<std::string> tokens_;
  std::unordered_map<std::string, int32_t> ids_;
  size_t num_special_ = 0;
  std::vector<Pair> merges_;
  std::vector<Word> words_;
  std::unordered_map<Pair, int64_t, PairHash> counts_;
  std::unordered_map<Pair, std::vector<int32_t>, PairHash> words_of_;
  std::priority_queue<Entry> queue_;
};

std::vector<SplitStep> steps_of(const BpeTrainingOptions& options) {
  std::vector<SplitStep> steps;
  if (options.split_digits) {
    steps.emplace_back();
    steps.back().kind = SplitStep::Kind::kDigits;
    steps.back().individual_digits = true;
  }
  steps.emplace_back();
  return steps;
}

Json file_of(const Trainer& trainer, const std::vector<AddedToken>& special, const BpeTrainingOptions& options) {
  const Json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  Json pre_tokenizer = byte_level;
  if (options.split_digits) {
    const Json digits = {{"type", "Digits"}, {"individual_digits", true}};
    pre_tokenizer = {{"type", "Sequence"}, {"pretokenizers", Json::array({digits, byte_level})}};
  }
  Json added = Json::array();
  for (const AddedToken& token : special) {
    added.push_back({{"id", token.id},
                     {"content", token.content},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  Json vocab = Json::object(), merges = Json::array();
  for (size_t id = 0; id < trainer.tokens().size(); ++id) {
    vocab.get_ref<Json::object_t&>().emplace_back(trainer.tokens()[id], id);  // operator[] would search
  }
  for (const auto& [left, right] : trainer.merges()) {
    merges.push_back(trainer.tokens()[static_cast<size_t>(left)] + " " + trainer.tokens()[static_cast<size_t>(right)]);
  }
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", std::move(added)},
          {"normalizer", {{"type", "NFC"}}},
          {"pre_tokenizer", std::move(pre_tokenizer)},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", false},
            {"vocab", std::move(vocab)},
            {"merges", std::move(merges)}}}};
}

}  // namespace

std::string train_bpe(const std::vector<std::string>& texts, const BpeTrainingOptions& options) {
  const auto smallest = static_cast<int64_t>(options.special_tokens.size()) + 256;
  check(options.vocab_size >= smallest, ErrorKind::kUsage,
        "vocabulary of {} tokens: {} special tokens and 256 bytes need {}", options.vocab_size,
        options.special_tokens.size(), smallest);
  std::vector<AddedToken> special;
  for (const std::string& content : options.special_tokens) {
    check(!content.empty(), ErrorKind::kUsage, "empty special token");
    AddedToken token;
    token.id = static_cast<int32_t>(special.size());
    token.content = content;
    token.special = true;
    special.push_back(token);
  }
  Trainer trainer(count_pieces(texts, special, steps_of(options)), special);
  trainer.run(static_cast<size_t>(options.vocab_size));
  return file_of(trainer, special, options).dump(1) + "\n";
}

}  // namespace lightmoe
