#pragma once
// Files to a stream of training rows.

#include <filesystem>
#include <string>
#include <vector>

#include "loaders/dataset.h"
#include "loaders/tokenizer.h"
#include "model/config.h"

namespace lightmoe {

struct DocumentsReport {
  int64_t records = 0, skipped = 0;  // skipped: invalid lines, with skip_invalid
  int64_t documents = 0, tokens = 0, loss_tokens = 0;
  std::vector<std::string> first_problems;
};
// .safetensors files give rows of token ids (loss on every token); the others are read by read_records and need the tokenizer (may
// be null otherwise). Multiple-choice records are refused: they are for evaluation. Error(kUsage) when a tokenizer is needed and
// absent, Error(kInput) on ids beyond the vocabulary.
std::vector<Document> load_documents(const std::vector<std::filesystem::path>& files, const OlmoeConfig& config,
                                     const Tokenizer* tokenizer, bool skip_invalid, DocumentsReport* report = nullptr);

}  // namespace lightmoe
