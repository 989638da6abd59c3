#include "model/training_data.h"

#include <algorithm>
#include <iterator>

#include "runtime/error.h"

namespace lightmoe {
namespace {

void check_ids(const Document& document, const std::filesystem::path& file, int64_t line, int64_t vocab) {
  for (const int32_t id : document.ids) {
    check(id >= 0 && id < vocab, ErrorKind::kInput, "{}:{}: token id {}, the model has {} (config.json: vocab_size)",
          file.string(), line, id, vocab);
  }
}

}  // namespace

std::vector<Document> load_documents(const std::vector<std::filesystem::path>& files, const OlmoeConfig& config,
                                     const Tokenizer* tokenizer, bool skip_invalid, DocumentsReport* report) {
  DocumentsReport total;
  std::vector<Document> documents;
  const auto eos = static_cast<int32_t>(config.eos_token_ids.empty() ? -1 : config.eos_token_ids.front());
  for (const std::filesystem::path& file : files) {
    if (file.extension() == ".safetensors") {
      std::vector<Document> rows = documents_from_tokens(file, config.vocab_size);
      total.records += static_cast<int64_t>(rows.size());
      std::move(rows.begin(), rows.end(), std::back_inserter(documents));
      continue;
    }
    check(tokenizer != nullptr, ErrorKind::kUsage,
          "{}: the model directory has no tokenizer.json; give token ids (--tokens)", file.string());
    ReadReport read;
    for (const TextRecord& record : read_records(file, {.skip_invalid = skip_invalid}, &read)) {
      check(record.choices.empty(), ErrorKind::kInput,
            "{}:{}: a multiple-choice record has no text to learn; the verb eval reads these", file.string(),
            record.line);
      documents.push_back(tokenize(record, *tokenizer, eos));
      check_ids(documents.back(), file, record.line, config.vocab_size);
    }
    total.records += read.records;
    total.skipped += read.skipped;
    total.first_problems.insert(total.first_problems.end(), read.first_problems.begin(), read.first_problems.end());
  }
  total.documents = static_cast<int64_t>(documents.size());
  for (const Document& document : documents) {
    total.tokens += static_cast<int64_t>(document.ids.size());
    total.loss_tokens += std::count(document.loss.begin(), document.loss.end(), 1);
  }
  if (report != nullptr) *report = total;
  return documents;
}

}  // namespace lightmoe
