// Properties of DataStream over random documents. Every token of every document is a different number, so that each place of a
// batch tells which document and which token it shows: id = document * kStride + token.

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "loaders/dataset.h"
#include "loaders/safetensors.h"
#include "runtime/philox.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

using testing::fails_with;

constexpr int32_t kStride = 1000, kPad = 777'777'777;

enum class Kind : uint8_t { kPlain, kMasked, kMixed };

std::vector<Document> random_documents(size_t count, size_t longest, Kind kind, uint64_t seed) {
  Philox random(seed, 5);
  std::vector<Document> documents(count);
  for (size_t d = 0; d < count; ++d) {
    const size_t length = 2 + random.below(longest - 1);
    const bool masked = kind == Kind::kMasked || (kind == Kind::kMixed && random.below(2) == 0);
    const size_t prompt = masked ? 1 + random.below(length - 1) : 0;
    for (size_t t = 0; t < length; ++t) {
      documents[d].ids.push_back(static_cast<int32_t>(d) * kStride + static_cast<int32_t>(t));
      documents[d].loss.push_back(t >= prompt ? 1 : 0);
    }
  }
  return documents;
}

DataStream::Options options_for(int64_t rows, int64_t length, bool pack) {
  DataStream::Options options;
  options.rows = rows;
  options.length = length;
  options.pack = pack;
  options.pad_id = kPad;
  return options;
}

// What holds in every batch, whatever the options.
void check_batch(const TokenRows& b, const std::vector<Document>& documents) {
  const auto size = static_cast<size_t>(b.rows * b.length);
  ASSERT_EQ(b.ids.size(), size);
  ASSERT_EQ(b.labels.size(), size);
  ASSERT_EQ(b.positions.size(), size);
  ASSERT_EQ(b.mask.size(), size);
  ASSERT_EQ(b.doc_begin.front(), 0);
  ASSERT_EQ(b.doc_begin.back(), static_cast<int32_t>(size));
  const std::set<int32_t> starts(b.doc_begin.begin(), b.doc_begin.end());
  ASSERT_EQ(starts.size(), b.doc_begin.size());
  for (int64_t row = 0; row < b.rows; ++row) ASSERT_TRUE(starts.count(static_cast<int32_t>(row * b.length)));
  int64_t labels = 0;
  for (size_t i = 0; i < size; ++i) {
    const bool start = starts.count(static_cast<int32_t>(i)) != 0;
    ASSERT_EQ(b.positions[i], start ? 0 : b.positions[i - 1] + 1);
    if (b.mask[i] == 0) {
      ASSERT_EQ(b.ids[i], kPad);
      ASSERT_EQ(b.labels[i], -100);
      ASSERT_TRUE(start || b.mask[i - 1] == 0);  // a document of its own
      continue;
    }
    const auto document = static_cast<size_t>(b.ids[i] / kStride), token = static_cast<size_t>(b.ids[i] % kStride);
    ASSERT_TRUE(start || b.ids[i] == b.ids[i - 1] + 1);  // so one document only
    const Document& d = documents.at(document);
    const bool labelled = token + 1 < d.ids.size() && d.loss[token + 1] != 0;
    ASSERT_EQ(b.labels[i], labelled ? b.ids[i] + 1 : -100);
    labels += labelled ? 1 : 0;
  }
  ASSERT_EQ(b.num_labels, labels);
}

struct Case {
  int64_t rows, length;
  bool pack;
  Kind kind;
  size_t count, longest;
};
const std::vector<Case> kCases = {
    {3, 31, true, Kind::kPlain, 40, 90}, {2, 33, true, Kind::kMasked, 50, 33}, {4, 17, true, Kind::kMixed, 61, 17},
    {1, 1, true, Kind::kPlain, 3, 5},    {5, 16, false, Kind::kMixed, 23, 16}, {8, 64, true, Kind::kMixed, 1, 9},
};

TEST(DataStream, EveryTokenOncePerEpoch) {
  for (const Case& s : kCases) {
    const std::vector<Document> documents = random_documents(s.count, s.longest, s.kind, s.count);
    DataStream::Options options = options_for(s.rows, s.length, s.pack);
    options.repeat = false;
    DataStream stream(documents, options);
    std::map<int32_t, int> seen, predicted;
    for (TokenRows b = stream.next(); b.rows > 0; b = stream.next()) {
      ASSERT_LE(b.rows, s.rows);
      check_batch(b, documents);
      for (size_t i = 0; i < b.ids.size(); ++i) {
        if (b.mask[i] != 0) ++seen[b.ids[i]];
        if (b.labels[i] >= 0) ++predicted[b.labels[i]];
      }
    }
    EXPECT_EQ(stream.next().rows, 0);
    for (const Document& d : documents) {
      for (size_t t = 0; t < d.ids.size(); ++t) {
        EXPECT_EQ(seen[d.ids[t]], 1);
        EXPECT_EQ(predicted[d.ids[t]], t > 0 && d.loss[t] != 0 ? 1 : 0);
      }
    }
  }
}

TEST(DataStream, MaskedDocumentsStayWhole) {
  const std::vector<Document> documents = random_documents(50, 20, Kind::kMasked, 9);
  DataStream::Options options = options_for(4, 24, true);
  options.repeat = false;
  DataStream stream(documents, options);
  for (TokenRows b = stream.next(); b.rows > 0; b = stream.next()) {
    for (size_t d = 0; d + 1 < b.doc_begin.size(); ++d) {
      const auto begin = static_cast<size_t>(b.doc_begin[d]), end = static_cast<size_t>(b.doc_begin[d + 1]);
      if (b.mask[begin] == 0) continue;
      EXPECT_EQ(b.ids[begin] % kStride, 0);
      EXPECT_EQ(end - begin, documents[static_cast<size_t>(b.ids[begin] / kStride)].ids.size());
    }
  }
}

bool equal(const TokenRows& a, const TokenRows& b) {
  return a.ids == b.ids && a.labels == b.labels && a.positions == b.positions && a.doc_begin == b.doc_begin &&
         a.mask == b.mask && a.num_labels == b.num_labels;
}

TEST(DataStream, SeekEqualsContinuing) {
  for (const Case& s : kCases) {
    const std::vector<Document> documents = random_documents(s.count, s.longest, s.kind, 3);
    const DataStream::Options options = options_for(s.rows, s.length, s.pack);
    DataStream stream(documents, options), other(documents, options);
    for (int step = 0; step < 40; ++step) {
      const DataStream::Position position = stream.position();
      const TokenRows batch = stream.next();
      check_batch(batch, documents);
      EXPECT_EQ(batch.rows, s.rows);
      other.seek(position);
      EXPECT_TRUE(equal(other.next(), batch)) << "step " << step;
      EXPECT_EQ(other.position(), stream.position());
    }
    EXPECT_GT(stream.position().epoch, 0u);
  }
}

TEST(DataStream, OrderDependsOnSeedAndEpochOnly) {
  const std::vector<Document> documents = random_documents(30, 8, Kind::kMasked, 4);
  const auto epoch_order = [&](uint64_t seed, bool shuffle, uint64_t epoch) {
    DataStream::Options options = options_for(1, 8, false);
    options.seed = seed;
    options.shuffle = shuffle;
    DataStream stream(documents, options);
    stream.seek({epoch, 0, 0});
    std::vector<int32_t> order;
    for (size_t i = 0; i < documents.size(); ++i) order.push_back(stream.next().ids[0] / kStride);
    return order;
  };
  std::vector<int32_t> given(30);
  for (int32_t i = 0; i < 30; ++i) given[static_cast<size_t>(i)] = i;
  EXPECT_EQ(epoch_order(1, false, 0), given);
  EXPECT_EQ(epoch_order(1, false, 7), given);
  EXPECT_EQ(epoch_order(1, true, 2), epoch_order(1, true, 2));
  EXPECT_NE(epoch_order(1, true, 0), given);
  EXPECT_NE(epoch_order(1, true, 0), epoch_order(1, true, 1));
  EXPECT_NE(epoch_order(1, true, 0), epoch_order(2, true, 0));
}

TEST(DataStream, RefusesPositionsOfOtherData) {
  DataStream stream(random_documents(3, 8, Kind::kPlain, 1), options_for(1, 8, true));
  EXPECT_TRUE(fails_with(ErrorKind::kResume, {"document 3 of 3"}, [&] { stream.seek({0, 3, 0}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kResume, {"token 99"}, [&] { stream.seek({0, 0, 99}); }));
}

TEST(DataStream, FingerprintTellsDataAndOptions) {
  const std::vector<Document> documents = random_documents(5, 8, Kind::kMixed, 1);
  const DataStream::Options options = options_for(2, 8, true);
  const std::string base = DataStream(documents, options).fingerprint();
  EXPECT_EQ(base, DataStream(documents, options).fingerprint());
  std::set<std::string> all = {base};
  const auto differs = [&](const std::vector<Document>& d, const DataStream::Options& o) {
    EXPECT_TRUE(all.insert(DataStream(d, o).fingerprint()).second);
  };
  for (int change = 0; change < 6; ++change) {
    DataStream::Options o = options;
    if (change == 0) o.rows = 3;
    if (change == 1) o.length = 9;
    if (change == 2) o.pack = false;
    if (change == 3) o.shuffle = false;
    if (change == 4) o.seed = 2;
    if (change == 5) o.truncate = true;
    differs(documents, o);
  }
  std::vector<Document> changed = documents;
  changed[2].ids[1] += 1;
  differs(changed, options);
  changed = documents;
  changed[2].loss[1] ^= 1;
  changed[2].loss.back() = 1;
  differs(changed, options);
  changed = documents;
  std::swap(changed[0], changed[1]);
  differs(changed, options);
}

TEST(DataStream, SaysWhyNothingIsLeft) {
  const Document masked{{1, 2, 3}, {1, 0, 0}}, single{{1}, {1}}, empty{};
  const DataStream::Options options = options_for(8, 8, true);
  EXPECT_TRUE(
      fails_with(ErrorKind::kInput, {"0 usable sequences (0 read, 0 filtered"}, [&] { DataStream({}, options); }));
  EXPECT_TRUE(
      fails_with(ErrorKind::kInput,
                 {"0 usable sequences (4 read, 4 filtered: 2 shorter than 2 tokens, 2 with every label masked)"}, [&] {
                   DataStream({masked, single, empty, masked}, options);
                 }));
  // Fewer sequences than a batch: the next epoch fills it.
  EXPECT_EQ(DataStream({{{1, 2}, {1, 1}}}, options).next().num_labels, 32);
}

TEST(DataStream, LongSequencesAndUnknownIds) {
  const Document masked{{1, 2, 3, 4, 5}, {0, 1, 1, 1, 1}}, late{{1, 2, 3, 4, 5}, {0, 0, 0, 0, 1}};
  DataStream::Options options = options_for(1, 4, true);
  EXPECT_TRUE(
      fails_with(ErrorKind::kInput, {"sequence 1 has 5 tokens, rows have 4"}, [&] { DataStream({masked}, options); }));
  options.truncate = true;
  DataStream stream({masked, late}, options);  // truncation takes the answer of the second one
  EXPECT_EQ(stream.num_truncated(), 2);
  EXPECT_EQ(stream.num_documents(), 1);
  EXPECT_EQ(stream.next().labels, (std::vector<int32_t>{2, 3, 4, -100}));
  options.vocab_size = 5;
  EXPECT_TRUE(
      fails_with(ErrorKind::kInput, {"sequence 1", "token id 5", "0 to 4"}, [&] { DataStream({masked}, options); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"token id -1"}, [&] { DataStream({{{1, -1}, {1, 1}}}, options); }));
  options.rows = 0;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"0 rows"}, [&] { DataStream({masked}, options); }));
}

TEST(TokenFiles, RowsAndDocuments) {
  const testing::TempDir dir;
  const auto file = dir / "ids.safetensors";
  write_safetensors(file, {{"input_ids", Tensor::from<int64_t>({1, 2, 3, 4, 5, 6}, {2, 3})}});
  const TokenRows rows = rows_from_tokens(file, 7);
  EXPECT_EQ(rows.rows, 2);
  EXPECT_EQ(rows.length, 3);
  EXPECT_EQ(rows.ids, (std::vector<int32_t>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(rows.labels, (std::vector<int32_t>{2, 3, -100, 5, 6, -100}));
  EXPECT_EQ(rows.doc_begin, (std::vector<int32_t>{0, 3, 6}));
  EXPECT_EQ(documents_from_tokens(file, 7)[1].ids, (std::vector<int32_t>{4, 5, 6}));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"token id 6", "0 to 5"}, [&] { rows_from_tokens(file, 6); }));
  const auto bad = dir / "bad.safetensors";
  write_safetensors(bad, {{"input_ids", Tensor::from<float>({1, 2}, {1, 2})}});
  EXPECT_TRUE(
      fails_with(ErrorKind::kInput, {"bad.safetensors", "input_ids", "F32"}, [&] { rows_from_tokens(bad, 6); }));
  const auto other = dir / "other.safetensors";
  write_safetensors(other, {{"ids", Tensor::from<int32_t>({1, 2}, {1, 2})}});
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"other.safetensors", "no tensor \"input_ids\""},
                         [&] { rows_from_tokens(other, 6); }));
}

}  // namespace
}  // namespace lightmoe
