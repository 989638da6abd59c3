#pragma once
// Text to training and evaluation rows.
//
// JSONL (.jsonl .ndjson .json: one object a line). The shape is recognised by its keys, in this order; other keys are ignored.
//   {"messages": [{"role", "content"}]}      role: system, user, assistant
//   {"conversations": [{"from", "value"}]}   from: system, human or user, gpt or assistant; the same with other names
//   {"instruction", "input"?, "output"}      instruction, then "\n\n" + input unless empty, then "\n\n"; then output
//   {"prompt", "choices": [...], "answer": index from 0}    multiple choice, evaluation only
//   {"prompt", "completion"}                 joined as they are
//   {"text"}
// Loss falls on: assistant and gpt turns, output, completion, all of text; and on the EOS that follows each of them.
// Conversations become OLMoE's chat form, where EOS stands for the token, and "\n" precedes every turn but the first:
//   <|system|>\nCONTENT   <|user|>\nCONTENT   <|assistant|>\nCONTENT EOS
// so "<|user|>\nHi\n<|assistant|>\n" has no loss and "Hello" EOS has. No BOS is added.
// The last part of a record is what has to be answered, what stands before it is the prompt.
//
// Text (.txt .text .md): one document per block of lines between blank lines, lines joined by "\n", loss on all of it.
//
// Errors: Error(kInput) "file.jsonl:17:3: reason" (line and column in bytes, from 1); with skip_invalid they are counted instead.
// BOM, CRLF and blank lines are tolerated; lines are streamed, a line or block over the cap is an error.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "loaders/tokenizer.h"

namespace lightmoe {

struct TextRecord {
  struct Part {
    std::string text;
    bool loss;         // does the loss fall on this part
    bool eos = false;  // EOS follows although it is not the last part: an earlier answer of a conversation
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
// Parts are encoded one by one and joined; eos_id >= 0 is appended with the loss of the last part, and after parts with .eos.
Document tokenize(const TextRecord& record, const Tokenizer& tokenizer, int32_t eos_id);
std::vector<Document> tokenize(const std::vector<TextRecord>& records, const Tokenizer& tokenizer, int32_t eos_id);

// The rows of `input_ids` [N, S] (I32 or I64) of a .safetensors file, for models without a tokenizer; loss on every token.
// Error(kInput) on an id outside [0, vocab_size).
std::vector<Document> documents_from_tokens(const std::filesystem::path& file, int64_t vocab_size);

// A batch of B rows of S tokens. Documents packed into a row attend only to themselves and positions restart at each.
struct TokenRows {
  int64_t rows = 0, length = 0;
  std::vector<int32_t> ids;     // [B*S], padded with pad_id
  std::vector<int32_t> labels;  // [B*S], the token after position i in its document where loss falls on it, else -100
  std::vector<int32_t> positions;  // [B*S]
  std::vector<int32_t>
      doc_begin;              // flat start of each document in [0, B*S], ending with B*S; padding is one of its own
  std::vector<uint8_t> mask;  // [B*S], 0 = padding
  int64_t num_labels = 0;
};
// The same file as documents_from_tokens, as one batch [N, S].
TokenRows rows_from_tokens(const std::filesystem::path& file, int64_t vocab_size);

// Deterministic order over documents with a position that can be saved and restored: seek(p), next() gives what next() gave when
// position() was p.
// Packing takes documents in order and fills a row. One with loss on all of its tokens (plain text) is cut at the end of a row
// and goes on in the next row as a document of its own; the label before the cut is the token after it, so no label is lost. One
// with masked tokens is never cut: if it does not fit, the rest of the row is padding.
class DataStream {
 public:
  struct Options {
    int64_t rows = 8, length = 256;
    bool pack = true;       // several documents a row; false: one document a row, padded
    bool shuffle = true;    // epoch e in an order drawn by Philox(seed, e); false: as given
    bool repeat = true;     // false: after one epoch next() gives 0 rows; the last batch may have fewer rows
    bool truncate = false;  // documents longer than a row that packing does not cut: error unless truncate
    uint64_t seed = 1;
    int32_t pad_id = 0;
    int64_t vocab_size = 0;  // > 0: ids from it on are refused
  };
  // Documents without anything to predict are left out. Error(kInput) "0 usable sequences (n read, m filtered: reasons)" when
  // nothing is left.
  DataStream(std::vector<Document> documents, const Options& options);
  TokenRows next();
  struct Position {
    uint64_t epoch = 0, next_document = 0;
    uint64_t offset = 0;  // within the document
    bool operator==(const Position&) const = default;
  };
  Position position() const { return position_; }
  void seek(const Position& position);  // Error(kResume) when there is no such place in these documents
  int64_t num_documents() const { return static_cast<int64_t>(documents_.size()); }
  int64_t num_truncated() const { return num_truncated_; }
  std::string fingerprint() const;  // XXH3-128 of all tokens and options: resume refuses other data

 private:
  bool at_end() const { return !options_.repeat && position_.epoch > 0; }
  void filter(std::vector<Document> documents);
  void shuffle_epoch();
  void fill_row(int64_t row, TokenRows& out);

  std::vector<Document> documents_;
  std::vector<uint32_t> order_;
  Options options_;
  Position position_;
  int64_t num_truncated_ = 0;
};

}  // namespace lightmoe
