#pragma once
// Byte-pair encoding of one piece (Sennrich, Haddow, Birch: "Neural machine translation of rare words with subword units",
// ACL 2016): starting from its bytes, the neighbouring pair whose merge has the lowest rank is joined, the leftmost one first,
// until no neighbours have a merge. O(n log n) in the bytes of the piece; short pieces are remembered. Thread-safe.

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lightmoe {

class BpeModel {
 public:
  // tokens by id; merges by rank, as written in the file (GPT-2's byte alphabet). Error(kInput), starting with `name`, on a merge
  // of or into a token that does not exist, or given twice.
  BpeModel(const std::vector<std::string>& tokens, const std::vector<std::pair<std::string, std::string>>& merges,
           const std::string& name);
  ~BpeModel();
  BpeModel(BpeModel&&) noexcept;
  // Appends the ids of the piece to `out`. Error(kInput) when the vocabulary lacks one of its bytes.
  void encode(std::string_view piece, std::vector<int32_t>& out) const;

 private:
  struct Merge {
    int32_t rank;
    int32_t id;
  };
  class Cache;
  const Merge* merge_of(int32_t left, int32_t right) const;
  void merge(std::string_view piece, std::vector<int32_t>& out) const;

  std::string name_;
  std::array<int32_t, 256> byte_ids_{};         // -1: not in the vocabulary
  std::unordered_map<uint64_t, Merge> merges_;  // left << 32 | right
  std::unique_ptr<Cache> cache_;
};

}  // namespace lightmoe
