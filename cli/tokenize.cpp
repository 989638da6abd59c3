#include <fmt/core.h>

#include <memory>

#include "cli/verb.h"
#include "loaders/dataset_lines.h"
#include "loaders/json.h"
#include "loaders/tokenizer.h"
#include "runtime/error.h"

namespace lightmoe::cli {
namespace {

constexpr int64_t kMaxLineBytes = int64_t{64} << 20;

struct Options {
  std::string tokenizer, jsonl;
  bool decode = false, skip_special = false;
};

std::string encode_line(const Tokenizer& tokenizer, const Json& line, const std::string& place) {
  const bool has_text = line.is_object() && line.contains("text") && line.at("text").is_string();
  check(has_text, ErrorKind::kInput, "{}: expected an object with a string \"text\"", place);
  return Json(tokenizer.encode(line.at("text").get_ref<const std::string&>())).dump();
}

std::string decode_line(const Tokenizer& tokenizer, const Json& line, const std::string& place, bool skip_special) {
  check(line.is_array(), ErrorKind::kInput, "{}: expected an array of token ids", place);
  std::vector<int32_t> ids;
  for (const Json& id : line) {
    const bool valid = id.is_number_integer() && id >= Json(0) && id < Json(tokenizer.vocab_size());
    check(valid, ErrorKind::kInput, "{}: element {} is {}, expected a token id from 0 to {}", place, ids.size(),
          printable(id.dump(), 40), tokenizer.vocab_size() - 1);
    ids.push_back(id.get<int32_t>());
  }
  return Json{{"text", tokenizer.decode(ids, skip_special)}}.dump();
}

void tokenize_lines(const Options& options) {
  const Tokenizer tokenizer = Tokenizer::load(options.tokenizer);
  LineReader reader(options.jsonl, kMaxLineBytes);
  std::string text;
  for (auto status = reader.next(text); status != LineReader::Status::kEnd; status = reader.next(text)) {
    const std::string place = fmt::format("{}:{}:1", options.jsonl, reader.line_number());
    check(status == LineReader::Status::kLine, ErrorKind::kInput, "{}: line is longer than {} bytes", place,
          kMaxLineBytes);
    if (text.empty()) continue;
    const Json line = parse_json_line(text, options.jsonl, reader.line_number());
    fmt::print("{}\n", options.decode ? decode_line(tokenizer, line, place, options.skip_special)
                                      : encode_line(tokenizer, line, place));
  }
}

const RegisterVerb verb{
    {"tokenize", "Models", "Turn text into token ids, or back", "lightmoe tokenize demo/base --jsonl texts.jsonl",
     [](Flags& app) -> VerbAction {
       auto options = std::make_shared<Options>();
       app.description(
           "Reads {\"text\": \"...\"} a line and prints [id,id,...] a line. With --decode it reads such arrays and "
           "prints "
           "{\"text\":\"...\"}:\nthe output of one is the input of the other. No special tokens are added; those that "
           "stand "
           "in the text are found.\nText comes back as it was but for the tokenizer's normalization (NFC), and bytes "
           "that "
           "are not UTF-8 come back as U+FFFD.");
       app.add_option("model", options->tokenizer, "model directory, or a tokenizer.json")->required();
       app.add_option("--jsonl", options->jsonl, "input file, one JSON value a line")->required();
       app.add_flag("--decode", options->decode, "token ids to text");
       app.add_flag("--skip-special", options->skip_special, "with --decode: leave special tokens out");
       return [options] { tokenize_lines(*options); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
