#include <algorithm>

#include "model/olmoe.h"

namespace lightmoe {
namespace {

int64_t count_labels(const std::vector<int32_t>& labels) {
  return std::count_if(labels.begin(), labels.end(), [](int32_t label) { return label != -100; });
}

// Collects sequences; key rows are the batch's own rows.
struct SequenceLists {
  std::vector<int32_t> q_begin, k_begin, k_count, q_pos;
  void add(int64_t query_begin, int64_t key_begin, int64_t key_count) {
    q_begin.push_back(static_cast<int32_t>(query_begin));
    k_begin.push_back(static_cast<int32_t>(key_begin));
    k_count.push_back(static_cast<int32_t>(key_count));
    q_pos.push_back(0);
  }
  AttentionSequences finish(int64_t tokens) {
    q_begin.push_back(static_cast<int32_t>(tokens));
    const auto tensor = [](const std::vector<int32_t>& v) { return Tensor::from(v, {static_cast<int64_t>(v.size())}); };
    return {.q_begin = tensor(q_begin), .k_begin = tensor(k_begin), .k_count = tensor(k_count), .q_pos = tensor(q_pos)};
  }
};

Tensor tensor_of(const std::vector<int32_t>& values) {
  return Tensor::from(values, {static_cast<int64_t>(values.size())});
}

}  // namespace

Batch make_batch(const std::vector<int32_t>& ids, int64_t rows, int64_t length, const std::vector<int32_t>& hf_labels,
                 const std::vector<uint8_t>& attention_mask) {
  const auto count = static_cast<size_t>(rows * length);
  require(ids.size() == count && (hf_labels.empty() || hf_labels.size() == count) &&
              (attention_mask.empty() || attention_mask.size() == count),
          "make_batch: {} ids, {} labels, {} mask entries for {} rows of {}", ids.size(), hf_labels.size(),
          attention_mask.size(), rows, length);
  std::vector<int32_t> positions(count);
  SequenceLists sequences;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t begin = r * length;
    int64_t first = 0, last = length;  // the row's real tokens
    if (!attention_mask.empty()) {
      const auto real = [&](int64_t i) { return attention_mask[static_cast<size_t>(begin + i)] != 0; };
      while (first < length && !real(first)) ++first;
      while (last > first && !real(last - 1)) --last;
      if (first == length) first = last = 0;
      for (int64_t i = first; i < last; ++i) {
        check(real(i), ErrorKind::kInput,
              "attention_mask: row {} has a hole at {}; only padding at the ends is allowed", r, i);
      }
    }
    // NOTE: padding before the text sees no key; padding after it sees the text, as in Hugging Face.
    if (first > 0) sequences.add(begin, begin, 0);
    if (length > first) sequences.add(begin + first, begin + first, last - first);
    for (int64_t i = 0; i < length; ++i)
      positions[static_cast<size_t>(begin + i)] = static_cast<int32_t>(std::max<int64_t>(0, i - first));
  }
  Batch batch{.ids = tensor_of(ids),
              .labels = {},
              .positions = tensor_of(positions),
              .sequences = sequences.finish(rows * length),
              .mask = {}};
  if (!hf_labels.empty()) {
    std::vector<int32_t> aligned(count, -100);
    for (size_t i = 0; i + 1 < count; ++i) {
      if ((i + 1) % static_cast<size_t>(length) != 0) aligned[i] = hf_labels[i + 1];
    }
    batch.labels = tensor_of(aligned);
    batch.num_labels = count_labels(aligned);
  }
  if (!attention_mask.empty()) batch.mask = Tensor::from(attention_mask, {rows * length});
  return batch;
}

Batch make_packed_batch(const std::vector<int32_t>& ids, const std::vector<int32_t>& labels,
                        const std::vector<int32_t>& positions, const std::vector<int32_t>& doc_begin) {
  require(labels.empty() || labels.size() == ids.size(), "make_packed_batch: {} labels for {} ids", labels.size(),
          ids.size());
  require(positions.size() == ids.size(), "make_packed_batch: {} positions for {} ids", positions.size(), ids.size());
  const auto tokens = static_cast<int64_t>(ids.size());
  require(!doc_begin.empty() && doc_begin.front() == 0 && doc_begin.back() == tokens &&
              std::is_sorted(doc_begin.begin(), doc_begin.end()),
          "make_packed_batch: documents must tile [0, {}]", tokens);
  SequenceLists sequences;
  for (size_t d = 0; d + 1 < doc_begin.size(); ++d)
    sequences.add(doc_begin[d], doc_begin[d], doc_begin[d + 1] - doc_begin[d]);
  return {.ids = tensor_of(ids),
          .labels = labels.empty() ? Tensor() : tensor_of(labels),
          .positions = tensor_of(positions),
          .sequences = sequences.finish(tokens),
          .num_labels = count_labels(labels),
          .mask = {}};
}

}  // namespace lightmoe
