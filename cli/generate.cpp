#include <fmt/format.h>
#include <fmt/ranges.h>

#include <filesystem>
#include <memory>

#include "cli/load.h"
#include "cli/routing_flags.h"
#include "cli/verb.h"
#include "loaders/dataset.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/eval_text.h"
#include "model/generate.h"
#include "runtime/error.h"
#include "runtime/memory.h"

namespace lightmoe::cli {
namespace {

constexpr int64_t kMaxPromptBytes = int64_t{1} << 30;

struct Options {
  ModelOptions model;
  std::vector<std::string> prompts, stop;
  std::string prompt_file, tokens, cache = "f32";
  RoutingFlags routing;
  GenerateOptions generate;
  bool json = false, ignore_eos = false;
};

// One prompt a line; .jsonl: the part before the answer of each record.
std::vector<std::string> read_prompts(const std::filesystem::path& file) {
  std::vector<std::string> prompts;
  if (file.extension() == ".jsonl") {
    for (const TextRecord& record : read_records(file, {}, nullptr)) {
      const Question question = question_of(record);
      prompts.push_back(question.context.empty() ? question.answer : question.context);
    }
    return prompts;
  }
  const std::string text = read_file(file, kMaxPromptBytes);
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    if (end > begin) prompts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  check(!prompts.empty(), ErrorKind::kInput, "{}: no prompt", file.string());
  return prompts;
}

Json to_json(const Options& options, const std::vector<std::string>& prompts, const std::vector<Generation>& results,
             const GenerateReport& report) {
  Json json = {{"model", options.model.path},
               {"seed", options.generate.sampling.seed},
               {"prefill_tokens", report.prefill_tokens},
               {"prefill_seconds", report.prefill_seconds},
               {"decode_tokens", report.decode_tokens},
               {"decode_seconds", report.decode_seconds},
               {"peak_rss_bytes", process_peak_rss_bytes()}};
  Json& sequences = json["sequences"] = Json::array();
  for (size_t i = 0; i < results.size(); ++i) {
    Json one = Json::object();
    if (i < prompts.size()) one["prompt"] = prompts[i];
    if (options.tokens.empty()) one["text"] = results[i].text;
    one["tokens"] = results[i].tokens;
    one["finish"] = name_of(results[i].finish);
    sequences.push_back(one);
  }
  return json;
}

double rate(int64_t tokens, double seconds) { return seconds > 0 ? static_cast<double>(tokens) / seconds : 0; }

void print(const Options& options, const std::vector<std::string>& prompts, const std::vector<Generation>& results,
           const GenerateReport& report) {
  if (options.json) {
    fmt::print("{}\n", to_json(options, prompts, results, report).dump(2, ' ', false, Json::error_handler_t::replace));
    return;
  }
  for (size_t i = 0; i < results.size(); ++i) {
    if (!prompts.empty()) {
      fmt::print("{}{}\n", prompts[i], results[i].text);
    } else {
      fmt::print("{}\n", fmt::join(results[i].tokens, " "));
    }
  }
  if (report.truncated > 0)
    fmt::print(stderr, "{} prompts longer than the context, their oldest tokens dropped\n", report.truncated);
  fmt::print(stderr, "prefill {} tokens, {:.1f} tokens/s; decode {} tokens, {:.1f} tokens/s; peak memory {:.2f} GB\n",
             report.prefill_tokens, rate(report.prefill_tokens, report.prefill_seconds), report.decode_tokens,
             rate(report.decode_tokens, report.decode_seconds), static_cast<double>(process_peak_rss_bytes()) / 1e9);
}

void run_generate(Options& options) {
  const int sources = !options.prompts.empty() + !options.prompt_file.empty() + !options.tokens.empty();
  check(sources == 1, ErrorKind::kUsage, "expected one of --prompt, --prompts and --tokens");
  check(options.cache == "f32" || options.cache == "bf16", ErrorKind::kUsage, "--cache {}: expected f32 or bf16",
        options.cache);
  check_sampling(options.generate.sampling);
  options.generate.cache_dtype = options.cache == "f32" ? DType::kF32 : DType::kBF16;
  options.generate.forward.compute = parse_compute(options.model.compute);
  std::vector<std::string> prompts = options.prompts;
  if (!options.prompt_file.empty()) prompts = read_prompts(options.prompt_file);
  std::vector<std::vector<int32_t>> ids;
  if (!options.tokens.empty()) ids = read_token_rows(options.tokens, options.model.path);
  const LoadedModel loaded = load(options.model);
  const RunRouting routing(options.routing, options.model.path, *loaded.model);
  options.generate.forward.routing = routing.options();
  check(prompts.empty() || loaded.tokenizer != nullptr, ErrorKind::kInput,
        "{}: no tokenizer.json; token ids go with --tokens", options.model.path);
  for (const std::string& prompt : prompts) ids.push_back(loaded.tokenizer->encode(prompt));
  if (loaded.tokenizer) options.generate.tokenizer = loaded.tokenizer.get();
  options.generate.stop_strings = options.stop;
  if (!options.ignore_eos) {
    const auto& eos = loaded.model->config.eos_token_ids;
    options.generate.eos_ids.assign(eos.begin(), eos.end());
  }
  GenerateReport report;
  const std::vector<Generation> results = generate(*loaded.model, ids, options.generate, &report);
  print(options, prompts, results, report);
  fmt::print(stderr, "{}", routing.summary());
}

const RegisterVerb verb{
    {"generate", "Evaluation", "Continue prompts with a KV cache", "lightmoe generate demo/base --prompt '47+85='",
     [](Flags& app) -> VerbAction {
       auto options = std::make_shared<Options>();
       GenerateOptions& generate = options->generate;
       add_model_options(app, options->model);
       add_routing_flags(app, options->routing);
       app.add_option("--prompt", options->prompts, "text to continue; may be given several times")
           ->allow_extra_args(false);
       app.add_option("--prompts", options->prompt_file, "file with one prompt a line, or .jsonl");
       app.add_option("--tokens", options->tokens, "safetensors file with input_ids, a prompt a row");
       app.add_option("--max-new-tokens", generate.max_new_tokens, "new tokens at most")->capture_default_str();
       app.add_option("--temperature", generate.sampling.temperature, "0 = greedy")->capture_default_str();
       app.add_option("--top-k", generate.sampling.top_k, "draw from the k likeliest (0 = all)")->capture_default_str();
       app.add_option("--top-p", generate.sampling.top_p, "draw from the likeliest that reach this mass")
           ->capture_default_str();
       app.add_option("--seed", generate.sampling.seed, "of the draws; prompt i uses stream i")->capture_default_str();
       app.add_option("--stop", options->stop, "end before this text; may be given several times")
           ->allow_extra_args(false);
       app.add_option("--batch", generate.batch, "prompts side by side")->capture_default_str();
       app.add_option("--cache", options->cache, "keys and values: f32, bf16")->capture_default_str();
       app.add_flag("--truncate", generate.truncate, "drop the oldest tokens of prompts longer than the context");
       app.add_flag("--ignore-eos", options->ignore_eos, "go on past the end-of-text token");
       app.add_flag("--json", options->json, "print one JSON object");
       return [options] { run_generate(*options); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
