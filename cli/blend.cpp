#include <fmt/format.h>

#include "cli/load.h"
#include "cli/verb.h"
#include "compress/weight_blend.h"
#include "model/eval.h"

namespace lightmoe::cli {
namespace {

struct Options {
  std::filesystem::path base;
  std::vector<std::filesystem::path> models;
  std::vector<std::string> tasks;
  std::vector<double> weights;
  std::string metric = "auto";
  double temperature = 0.1;
  int64_t limit = 100;
};

// The prompt's tokens: all parts but the last, which is what has to be answered.
std::vector<int32_t> prompt_of(const TextRecord& record, const Tokenizer& tokenizer) {
  TextRecord prompt = record;
  if (prompt.parts.size() > 1) prompt.parts.pop_back();
  return tokenize(prompt, tokenizer, -1).ids;
}

void run_task(const Options& o, WeightBlend& blend, const Tokenizer& tokenizer, const std::string& file,
              std::vector<TextRecord> records) {
  if (o.limit > 0 && records.size() > static_cast<size_t>(o.limit)) records.resize(static_cast<size_t>(o.limit));
  const EvalOptions options{.metric = parse_eval_metric(o.metric)};
  std::vector<double> mean(blend.count(), 0.0);
  double value = 0;
  std::string metric;
  for (const TextRecord& record : records) {
    const std::vector<double> w =
        o.weights.empty() ? blend.weights_for(prompt_of(record, tokenizer), o.temperature) : o.weights;
    blend.set(w);
    const EvalResult result = evaluate(blend.model(), tokenizer, {record}, options);
    metric = result.main().name;
    value += result.main().value / static_cast<double>(records.size());
    for (size_t i = 0; i < mean.size(); ++i) mean[i] += w[i] / static_cast<double>(records.size());
  }
  fmt::print("{}: {} {:.4f} (mean of {} records), mean weights {:.3f}\n", file, metric, value, records.size(),
             fmt::join(mean, " "));
}

void run_blend(const Options& o) {
  check(o.weights.empty() || o.weights.size() == o.models.size(), ErrorKind::kUsage,
        "--weights: {} numbers for {} models", o.weights.size(), o.models.size());
  check(o.temperature > 0, ErrorKind::kUsage, "--temperature {:g}: expected a number > 0", o.temperature);
  std::vector<std::vector<TextRecord>> records;
  for (const std::string& file : o.tasks) {
    ReadReport read;
    records.push_back(read_records(file, {}, &read));
  }
  const Tokenizer tokenizer = Tokenizer::load(o.base);
  WeightBlend blend(o.base, o.models);
  for (size_t i = 0; i < o.tasks.size(); ++i) run_task(o, blend, tokenizer, o.tasks[i], records[i]);
}

const RegisterVerb verb{
    {"blend", "Evaluation", "Weights blended for each sequence from fine-tuned models of one base (WEMoE)",
     "lightmoe blend olmoe-math olmoe-code --base OLMoE-1B-7B --task math.test.jsonl --temperature 0.1",
     [](Flags& app) -> VerbAction {
       auto o = std::make_shared<Options>();
       app.add_option("models", o->models, "fine-tuned model directories")->required();
       app.add_option("--base", o->base, "the model they come from")->required();
       app.add_option("--task", o->tasks, "JSONL files to measure on")->required();
       app.add_option("--weights", o->weights, "fixed, one per model (default: from each prompt's loss)");
       app.add_option("--temperature", o->temperature, "of the softmax over the models' losses on the prompt")
           ->capture_default_str();
       app.add_option("--metric", o->metric, "auto, loss, perplexity, exact_match, multiple_choice")
           ->capture_default_str();
       app.add_option("--limit", o->limit, "first records only (0 = all)")->capture_default_str();
       return [o] { run_blend(*o); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
