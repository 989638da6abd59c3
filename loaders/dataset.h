#pragma once
// Text to training and evaluation rows.
// JSONL shapes (one object a line), recognised by their keys:
//   {"text"}  {"messages":[{"role","content"}]}  {"conversations":[{"from","value"}]}  {"instruction","input"?,"output"}
//   {"prompt","completion"}; and for evaluation {"prompt","choices":[...],"answer":index}.
// Loss falls on: all tokens of text; assistant / gpt turns; output; completion; always with the EOS that follows.
// Errors: Error(kInput) "file.jsonl:17:3: reason"; skip_invalid counts instead. BOM, CRLF and a blank last line are tolerated;
// lines are streamed with a cap. A .txt file is one document per blank-line-separated block.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "loaders/tokenizer.h"

namespace lightmoe {

struct TextRecord {
  struct Part {
    std::string text;
    bool loss;  // does the loss fall on this part
  };
  std::vector<Part> parts;
  std::vector<std::string> choices;  // multiple choice only
  int64_t answer = -1;
  int64_t line = 0;
};
struct ReadOptions {
  bool skip_invalid = false;
  int64_t max_line_bytes = int64_t{64} << 20;
};
struct ReadReport {
  int64_t records = 0, skipped = 0;
  std::vector<std::string> first_problems;  // at most 5
};
std::vector<TextRecord> read_records(const std::filesystem::path& file, const ReadOptions& options, ReadReport* report);

// One tokenized document: ids and, per token, whether the loss falls on PREDICTING it.
struct Document {
  std::vector<int32_t> ids;
  std::vector<uint8_t> loss;
};
// Parts are encoded one by one and joined; eos_id >= 0 is appended with the loss of the last part.
Document tokenize(const TextRecord& record, const Tokenizer& tokenizer, int32_t eos_id);

// A batch of B rows of S tokens. Documents packed into a row attend only to themselves and positions restart at each.
struct TokenRows {
  int64_t rows = 0, length = 0;
  std::vector<int32_t> ids;  // [B*S], padded with pad_id
  std::vector<int32_t>
      labels;  // [B*S], label of position i is token i+1 of the same document where loss falls on it, else -100
  std::vector<int32_t> positions;  // [B*S]
  std::vector<int32_t>
      doc_begin;  // flat start of each document in [0, B*S], ending with B*S; padding is a document of its own
  std::vector<uint8_t> mask;  // [B*S], 0 = padding
  int64_t num_labels = 0;
};

// Deterministic order over documents with a position that can be saved and restored.
class DataStream {
 public:
  struct Options {
    int64_t rows = 8, length = 256;
    bool pack = true;  // several documents a row; false: one document a row, padded
    bool shuffle = true;
    bool truncate =
        false;  // documents longer than a row: error unless truncate (pack splits plain text at row borders)
    uint64_t seed = 1;
    int32_t pad_id = 0;
  };
  // Error(kInput) "0 usable sequences (n read, m filtered: reasons)" when nothing is left.
  DataStream(std::vector<Document> documents, const Options& options);
  TokenRows next();  // wraps to the next epoch with a new permutation, Philox(seed, epoch)
  struct Position {
    uint64_t epoch = 0, next_document = 0;
    uint64_t offset = 0;  // within the document
  };
  Position position() const { return position_; }
  void seek(const Position& position);
  int64_t num_documents() const { return static_cast<int64_t>(documents_.size()); }
  std::string fingerprint() const;  // XXH3 of all tokens and options: resume refuses other data

 private:
  void shuffle_epoch();
  std::vector<Document> documents_;
  std::vector<uint32_t> order_;
  Options options_;
  Position position_;
};

}  // namespace lightmoe
