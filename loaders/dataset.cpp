#include "loaders/dataset.h"

#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include <algorithm>
#include <numeric>

#include "loaders/safetensors.h"
#include "runtime/error.h"
#include "runtime/parallel.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

constexpr int32_t kNoLabel = -100;

bool is_plain(const Document& document) {
  return std::all_of(document.loss.begin(), document.loss.end(), [](uint8_t l) { return l != 0; });
}

// The first token is never predicted.
bool has_label(const Document& document) {
  return document.loss.size() > 1 &&
         std::any_of(document.loss.begin() + 1, document.loss.end(), [](uint8_t l) { return l != 0; });
}

void append(Document& document, const std::vector<int32_t>& ids, bool loss) {
  document.ids.insert(document.ids.end(), ids.begin(), ids.end());
  document.loss.resize(document.ids.size(), loss ? 1 : 0);
}

// `where` starts the message: "file: " or nothing.
void check_ids(const Document& document, size_t index, int64_t vocab_size, const std::string& where = "") {
  require(document.ids.size() == document.loss.size(), "DataStream: document {}: {} ids, {} loss flags", index,
          document.ids.size(), document.loss.size());
  for (const int32_t id : document.ids) {
    check(id >= 0 && (vocab_size <= 0 || id < vocab_size), ErrorKind::kInput,
          "{}sequence {}: token id {}, the model has ids from 0 to {}; is this its tokenizer?", where, index + 1, id,
          vocab_size - 1);
  }
}

}  // namespace

Document tokenize(const TextRecord& record, const Tokenizer& tokenizer, int32_t eos_id) {
  Document document;
  for (const TextRecord::Part& part : record.parts) {
    append(document, tokenizer.encode(part.text), part.loss);
    const bool last = &part == &record.parts.back();
    if (eos_id >= 0 && (last || part.eos)) append(document, {eos_id}, part.loss);
  }
  return document;
}

std::vector<Document> tokenize(const std::vector<TextRecord>& records, const Tokenizer& tokenizer, int32_t eos_id) {
  std::vector<Document> documents(records.size());
  parallel_for(0, static_cast<int64_t>(records.size()), 16, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      documents[i] = tokenize(records[i], tokenizer, eos_id);
    }
  });
  return documents;
}

std::vector<Document> documents_from_tokens(const std::filesystem::path& file, int64_t vocab_size) {
  const SafetensorsFile tensors(file);
  const TensorInfo* info = tensors.find("input_ids");
  check(info != nullptr, ErrorKind::kInput, "{}: no tensor \"input_ids\"", file.string());
  const bool integers = info->file_dtype == "I32" || info->file_dtype == "I64";
  check(integers && info->shape.size() == 2, ErrorKind::kInput,
        "{}: tensor \"input_ids\" is {} of rank {}, expected I32 or I64 [N, S]", file.string(), info->file_dtype,
        info->shape.size());
  const DeviceScope host(DeviceKind::kCpu);
  const Tensor ids = tensors.read("input_ids", DType::kI32);
  std::vector<Document> documents(static_cast<size_t>(ids.dim(0)));
  for (int64_t n = 0; n < ids.dim(0); ++n) {
    const int32_t* row = ids.data<int32_t>() + n * ids.dim(1);
    append(documents[static_cast<size_t>(n)], {row, row + ids.dim(1)}, true);
    check_ids(documents[static_cast<size_t>(n)], static_cast<size_t>(n), vocab_size, file.string() + ": ");
  }
  return documents;
}

TokenRows rows_from_tokens(const std::filesystem::path& file, int64_t vocab_size) {
  std::vector<Document> documents = documents_from_tokens(file, vocab_size);
  check(!documents.empty(), ErrorKind::kInput, "{}: tensor \"input_ids\" has no rows", file.string());
  DataStream::Options options;
  options.rows = static_cast<int64_t>(documents.size());
  options.length = std::max<int64_t>(1, static_cast<int64_t>(documents[0].ids.size()));
  options.pack = options.shuffle = options.repeat = false;
  return DataStream(std::move(documents), options).next();
}

DataStream::DataStream(std::vector<Document> documents, const Options& options) : options_(options) {
  check(options.rows > 0 && options.length > 0 && options.rows <= INT32_MAX / options.length, ErrorKind::kUsage,
        "batch of {} rows of {} tokens, expected at least 1 x 1 and less than 2^31 tokens", options.rows,
        options.length);
  filter(std::move(documents));
  order_.resize(documents_.size());
  shuffle_epoch();
}

void DataStream::filter(std::vector<Document> documents) {
  const auto length = static_cast<size_t>(options_.length);
  int64_t too_short = 0, masked = 0;
  for (size_t i = 0; i < documents.size(); ++i) {
    Document& document = documents[i];
    check_ids(document, i, options_.vocab_size);
    const bool may_be_cut = options_.pack && is_plain(document);
    if (document.ids.size() > length && !may_be_cut) {
      check(options_.truncate, ErrorKind::kInput,
            "sequence {} has {} tokens, rows have {}: make rows longer or allow truncation", i + 1, document.ids.size(),
            length);
      document.ids.resize(length);
      document.loss.resize(length);
      ++num_truncated_;
    }
    if (document.ids.size() < 2)
      ++too_short;
    else if (!has_label(document))
      ++masked;
    else
      documents_.push_back(std::move(document));
  }
  check(!documents_.empty(), ErrorKind::kInput,
        "0 usable sequences ({} read, {} filtered: {} shorter than 2 tokens, {} with every label masked)",
        documents.size(), too_short + masked, too_short, masked);
  check(documents_.size() <= UINT32_MAX, ErrorKind::kInput, "{} sequences, at most 2^32 - 1", documents_.size());
}

// Fisher-Yates from the identity, so that an epoch's order needs no history.
void DataStream::shuffle_epoch() {
  std::iota(order_.begin(), order_.end(), 0u);
  if (!options_.shuffle) return;
  Philox random(options_.seed, position_.epoch);
  for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random.below(i)]);
}

void DataStream::seek(const Position& position) {
  const bool finished = !options_.repeat && position.epoch > 0;
  const bool exists = position.next_document < order_.size() && (options_.repeat || position.epoch <= 1) &&
                      (!finished || (position.next_document == 0 && position.offset == 0));
  check(exists, ErrorKind::kResume, "data position epoch {}, document {} of {}, token {}: not in this data",
        position.epoch, position.next_document, order_.size(), position.offset);
  position_ = position;
  shuffle_epoch();
  const Document& document = documents_[order_[position.next_document]];
  check(position.offset < document.ids.size(), ErrorKind::kResume, "data position token {} of a document of {}",
        position.offset, document.ids.size());
}

TokenRows DataStream::next() {
  const auto tokens = static_cast<size_t>(options_.rows * options_.length);
  TokenRows out;
  out.length = options_.length;
  out.ids.assign(tokens, options_.pad_id);
  out.labels.assign(tokens, kNoLabel);
  out.positions.assign(tokens, 0);
  out.mask.assign(tokens, 0);
  while (out.rows < options_.rows && !at_end()) fill_row(out.rows++, out);
  const auto used = static_cast<size_t>(out.rows * out.length);
  out.ids.resize(used);
  out.labels.resize(used);
  out.positions.resize(used);
  out.mask.resize(used);
  out.doc_begin.push_back(static_cast<int32_t>(used));
  return out;
}

void DataStream::fill_row(int64_t row, TokenRows& out) {
  auto at = static_cast<size_t>(row * options_.length);
  const size_t end = at + static_cast<size_t>(options_.length);
  bool row_open = true;
  while (row_open && at < end && !at_end()) {
    const Document& document = documents_[order_[position_.next_document]];
    const size_t begin = position_.offset, left = document.ids.size() - begin;
    if (left > end - at && !is_plain(document)) break;
    const size_t count = std::min(left, end - at);
    out.doc_begin.push_back(static_cast<int32_t>(at));
    for (size_t i = begin; i < begin + count; ++i, ++at) {
      out.ids[at] = document.ids[i];
      out.positions[at] = static_cast<int32_t>(i - begin);
      out.mask[at] = 1;
      if (i + 1 < document.ids.size() && document.loss[i + 1] != 0) {
        out.labels[at] = document.ids[i + 1];
        ++out.num_labels;
      }
    }
    position_.offset += count;
    if (count == left) {
      position_.offset = 0;
      if (++position_.next_document == order_.size()) {
        position_.next_document = 0;
        ++position_.epoch;
        shuffle_epoch();
      }
    }
    row_open = options_.pack;
  }
  if (at < end) out.doc_begin.push_back(static_cast<int32_t>(at));
  for (int32_t position = 0; at < end; ++at) out.positions[at] = position++;
}

std::string DataStream::fingerprint() const {
  XXH3_state_t state;
  XXH3_128bits_reset(&state);
  const auto add = [&](const void* data, size_t bytes) { XXH3_128bits_update(&state, data, bytes); };
  const auto add_number = [&](uint64_t value) { add(&value, sizeof value); };
  const Options& o = options_;
  for (const int64_t value : {o.rows, o.length, int64_t{o.pack}, int64_t{o.shuffle}, int64_t{o.repeat},
                              int64_t{o.truncate}, static_cast<int64_t>(o.seed), int64_t{o.pad_id}}) {
    add_number(static_cast<uint64_t>(value));
  }
  for (const Document& document : documents_) {
    add_number(document.ids.size());
    add(document.ids.data(), document.ids.size() * sizeof(int32_t));
    add(document.loss.data(), document.loss.size());
  }
  const XXH128_hash_t hash = XXH3_128bits_digest(&state);
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

}  // namespace lightmoe
