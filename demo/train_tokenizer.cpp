// Trains the demo's tokenizer: demo-train_tokenizer TEXT.jsonl DIRECTORY [--vocabulary N]. Byte-level BPE, digits one by one,
// on the text of the records (every answer included); writes tokenizer.json and what Hugging Face wants beside it.

#include <fmt/core.h>

#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "loaders/dataset.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "loaders/tokenizer.h"
#include "runtime/error.h"

namespace lightmoe::demo {
namespace {

constexpr size_t kMaxDocuments = 40'000;  // a third of the pretraining mix: the merges do not change with more
constexpr int64_t kVocabulary = 1024;
const char* const kEos = "<|endoftext|>";  // id 0, as demo/base_config.json says
const char* const kPad = "<|padding|>";    // id 1

void train(const std::filesystem::path& data, const std::filesystem::path& directory, int64_t vocabulary) {
  std::vector<std::string> texts;
  for (const TextRecord& record : read_records(data, {}, nullptr)) {
    if (texts.size() == kMaxDocuments) break;
    std::string text;
    for (const TextRecord::Part& part : record.parts) text += part.text;
    texts.push_back(std::move(text));
  }
  std::filesystem::create_directories(directory);
  write_file_atomically(
      directory / "tokenizer.json",
      train_bpe(texts, {.vocab_size = vocabulary, .special_tokens = {kEos, kPad}, .split_digits = true}));
  const Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"eos_token", kEos},
                       {"pad_token", kPad},
                       {"add_bos_token", false},
                       {"clean_up_tokenization_spaces", false}};
  write_file_atomically(directory / "tokenizer_config.json", config.dump(2) + "\n");
  const Tokenizer tokenizer = Tokenizer::load(directory);
  size_t tokens = 0, bytes = 0;
  for (const std::string& text : texts) tokens += tokenizer.encode(text).size(), bytes += text.size();
  fmt::print("tokenizer: {} ids, {:.2f} bytes a token on {} documents\n", tokenizer.vocab_size(),
             static_cast<double>(bytes) / static_cast<double>(tokens), texts.size());
}

}  // namespace
}  // namespace lightmoe::demo

int main(int argc, char** argv) {
  try {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    const bool sized = arguments.size() == 4 && arguments[2] == "--vocabulary";
    lightmoe::check(arguments.size() == 2 || sized, lightmoe::ErrorKind::kUsage,
                    "usage: demo-train_tokenizer TEXT.jsonl DIRECTORY [--vocabulary N]");
    lightmoe::demo::train(arguments[0], arguments[1], sized ? std::stol(arguments[3]) : lightmoe::demo::kVocabulary);
    return 0;
  } catch (const lightmoe::Error& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return error.exit_code();
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return 1;
  }
}
