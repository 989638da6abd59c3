#include "loaders/bpe.h"

#include <mutex>
#include <queue>
#include <tuple>

#include "loaders/tokenizer_text.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

struct ViewHash {
  using is_transparent = void;
  size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
};

uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

// Pieces seen before. Full shards stop learning: text has far fewer frequent pieces than places here.
class BpeModel::Cache {
 public:
  static constexpr size_t kMaxPieceBytes = 64;

  bool find(std::string_view piece, std::vector<int32_t>& out) {
    Shard& shard = shard_of(piece);
    const std::lock_guard<std::mutex> lock(shard.mutex);
    const auto found = shard.ids.find(piece);
    if (found == shard.ids.end()) return false;
    out.insert(out.end(), found->second.begin(), found->second.end());
    return true;
  }
  void insert(std::string_view piece, std::vector<int32_t> ids) {
    Shard& shard = shard_of(piece);
    const std::lock_guard<std::mutex> lock(shard.mutex);
    if (shard.ids.size() < kShardPieces) shard.ids.emplace(piece, std::move(ids));
  }

 private:
  static constexpr size_t kShards = 16, kShardPieces = 8192;
  struct Shard {
    std::mutex mutex;
    std::unordered_map<std::string, std::vector<int32_t>, ViewHash, std::equal_to<>> ids;
  };
  Shard& shard_of(std::string_view piece) { return shards_[ViewHash{}(piece) >> 32 & (kShards - 1)]; }
  std::array<Shard, kShards> shards_;
};

BpeModel::BpeModel(const std::vector<std::string>& tokens,
                   const std::vector<std::pair<std::string, std::string>>& merges, const std::string& name)
    : name_(name), cache_(std::make_unique<Cache>()) {
  std::unordered_map<std::string_view, int32_t> ids;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (!tokens[i].empty()) ids.emplace(tokens[i], static_cast<int32_t>(i));
  }
  const auto id_of = [&](const std::string& token, size_t rank) {
    const auto found = ids.find(token);
    check(found != ids.end(), ErrorKind::kInput, "{}: model.merges[{}]: token \"{}\" is not in the vocabulary", name,
          rank, printable(token));
    return found->second;
  };
  for (size_t b = 0; b < byte_ids_.size(); ++b) {
    std::string character;
    text::append_utf8(text::character_of_byte(static_cast<uint8_t>(b)), character);
    const auto found = ids.find(character);
    byte_ids_[b] = found == ids.end() ? -1 : found->second;
  }
  merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    const Merge merge{static_cast<int32_t>(rank), id_of(left + right, rank)};
    const bool is_new = merges_.emplace(pair_key(id_of(left, rank), id_of(right, rank)), merge).second;
    check(is_new, ErrorKind::kInput, "{}: model.merges[{}]: \"{}\" and \"{}\" are merged twice", name, rank,
          printable(left), printable(right));
  }
}
BpeModel::~BpeModel() = default;
BpeModel::BpeModel(BpeModel&&) noexcept = default;

const BpeModel::Merge* BpeModel::merge_of(int32_t left, int32_t right) const {
  const auto found = merges_.find(pair_key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

void BpeModel::encode(std::string_view piece, std::vector<int32_t>& out) const {
  if (piece.size() > Cache::kMaxPieceBytes) return merge(piece, out);
  if (cache_->find(piece, out)) return;
  const size_t before = out.size();
  merge(piece, out);
  cache_->insert(piece, {out.begin() + static_cast<int64_t>(before), out.end()});
}

void BpeModel::merge(std::string_view piece, std::vector<int32_t>& out) const {
  struct Symbol {
    int32_t id;
    int32_t previous, next;  // -1: none
  };
  struct Candidate {
    int32_t rank, at;             // at: index of the left symbol
    int32_t left, right, result;  // ids when the candidate was made
    bool operator>(const Candidate& other) const { return std::tie(rank, at) > std::tie(other.rank, other.at); }
  };
  const auto count = static_cast<int32_t>(piece.size());
  std::vector<Symbol> symbols(piece.size());
  for (int32_t i = 0; i < count; ++i) {
    const auto byte = static_cast<uint8_t>(piece[static_cast<size_t>(i)]);
    check(byte_ids_[byte] >= 0, ErrorKind::kInput, "{}: model.vocab has no token for byte 0x{:02x}", name_, byte);
    symbols[static_cast<size_t>(i)] = {byte_ids_[byte], i - 1, i + 1 < count ? i + 1 : -1};
  }
  const auto symbol = [&](int32_t i) -> Symbol& { return symbols[static_cast<size_t>(i)]; };
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto consider = [&](int32_t at) {
    if (at < 0 || symbol(at).next < 0) return;
    const int32_t left = symbol(at).id, right = symbol(symbol(at).next).id;
    if (const Merge* m = merge_of(left, right)) queue.push({m->rank, at, left, right, m->id});
  };
  for (int32_t i = 0; i < count; ++i) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbol(best.at);
    // A symbol that was joined to its left neighbour has id -1, which no candidate has.
    if (left.id != best.left || left.next < 0 || symbol(left.next).id != best.right) continue;
    Symbol& right = symbol(left.next);
    left.id = best.result;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbol(left.next).previous = best.at;
    consider(left.previous);
    consider(best.at);
  }
  for (int32_t i = 0; i >= 0 && i < count; i = symbol(i).next) out.push_back(symbol(i).id);
}

}  // namespace lightmoe
