#include <fmt/core.h>

#include <filesystem>
#include <memory>

#include "cli/load.h"
#include "cli/routing_flags.h"
#include "cli/verb.h"
#include "kernels/gemm.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/eval.h"
#include "runtime/error.h"
#include "runtime/version.h"

namespace lightmoe::cli {
namespace {

struct Options {
  ModelOptions model;
  std::vector<std::string> tasks;
  std::string metric = "auto", reference, tokens, out;
  int64_t batch = 32, limit = 0, context = 0, max_new_tokens = 0;
  RoutingFlags routing;
  bool truncate = false, samples = false, force = false, skip_invalid = false, no_hash = false;
};

struct TaskResult {
  std::string file;
  std::string hash;
  EvalResult result;
};

Json report(const Options& options, const EvalOptions& eval, const RunRouting& routing,
            const std::vector<TaskResult>& results) {
  Json json = {{"version", version()},
               {"model", options.model.path},
               {"reference", options.reference.empty() ? Json(nullptr) : Json(options.reference)}};
  if (!options.no_hash) {
    json["model_hash"] = model_hash(options.model.path);
    if (!options.reference.empty()) json["reference_hash"] = model_hash(options.reference);
  }
  json["config"] = {{"metric", options.metric},
                    {"batch", eval.batch},
                    {"limit", eval.limit},
                    {"context", eval.context},
                    {"truncate", eval.truncate},
                    {"max_new_tokens", eval.max_new_tokens},
                    {"dtype", options.model.dtype},
                    {"compute", options.model.compute},
                    {"gemm", eval.gemm},
                    {"experts_per_token", options.routing.experts_per_token},
                    {"decoding", "greedy"}};
  if (const Json choices = routing.report(); !choices.is_null()) json["config"].update(choices);
  Json& tasks = json["tasks"] = Json::array();
  for (const TaskResult& task : results) {
    Json one = {{"file", task.file}, {"file_hash", task.hash}};
    one.update(to_json(task.result));
    tasks.push_back(one);
  }
  return json;
}

EvalOptions eval_options(const Options& options) {
  EvalOptions eval{.metric = parse_eval_metric(options.metric),
                   .batch = options.batch,
                   .limit = options.limit,
                   .context = options.context,
                   .truncate = options.truncate,
                   .max_new_tokens = options.max_new_tokens,
                   .compute = parse_compute(options.model.compute),
                   .keep_samples = options.samples};
  if (forced_gemm_backend() != "auto") eval.gemm = forced_gemm_backend();
  return eval;
}

// Refused before the model is loaded: a result must not cost minutes and then have nowhere to go.
void check_output(const Options& options) {
  if (options.out.empty()) return;
  check(options.force || !std::filesystem::exists(options.out), ErrorKind::kUsage, "{} exists; --force replaces it",
        options.out);
  const std::filesystem::path parent = std::filesystem::absolute(options.out).parent_path();
  check(std::filesystem::is_directory(parent), ErrorKind::kUsage, "{}: no such directory", parent.string());
}

void run_eval(const Options& options) {
  check(options.tasks.empty() != options.tokens.empty(), ErrorKind::kUsage, "expected --task FILE or --tokens FILE");
  EvalOptions eval = eval_options(options);
  check_output(options);
  std::vector<std::vector<TextRecord>> records;  // bad data is found before the model is loaded, too
  for (const std::string& file : options.tasks) {
    ReadReport read;
    records.push_back(read_records(file, {.skip_invalid = options.skip_invalid}, &read));
    if (read.skipped > 0) fmt::print(stderr, "{}: {} invalid records skipped\n", file, read.skipped);
  }
  std::vector<std::vector<int32_t>> rows;
  if (!options.tokens.empty()) rows = read_token_rows(options.tokens, options.model.path);
  const LoadedModel loaded = load(options.model);
  const RunRouting routing(options.routing, options.model.path, *loaded.model);
  eval.routing = routing.options();
  std::unique_ptr<Olmoe> reference;
  if (!options.reference.empty()) {
    reference = load({options.reference, options.model.dtype, options.model.compute}).model;
    eval.reference = reference.get();
  }
  check(options.tasks.empty() || loaded.tokenizer != nullptr, ErrorKind::kInput,
        "{}: no tokenizer.json; token ids go with --tokens", options.model.path);
  std::vector<TaskResult> results;
  for (size_t i = 0; i < options.tasks.size(); ++i) {
    results.push_back(
        {options.tasks[i], hash_file(options.tasks[i]), evaluate(*loaded.model, *loaded.tokenizer, records[i], eval)});
  }
  if (!options.tokens.empty()) {
    results.push_back({options.tokens, hash_file(options.tokens), evaluate_tokens(*loaded.model, rows, eval)});
  }
  for (const TaskResult& task : results) {
    const std::filesystem::path file = task.file;
    const std::string name = (file.parent_path().filename() / file.stem()).string();
    fmt::print("{}", to_table(name, task.result));
  }
  fmt::print("{}", routing.summary());
  if (!options.out.empty()) write_file_atomically(options.out, report(options, eval, routing, results).dump(2) + "\n");
}

const RegisterVerb verb{
    {"eval", "Evaluation", "Measure a model on task files, alone or against a reference model",
     "lightmoe eval demo/base --task build/demo/data/math/test.jsonl --batch 64 --out math.json",
     [](Flags& app) -> VerbAction {
       auto options = std::make_shared<Options>();
       add_model_options(app, options->model);
       add_routing_flags(app, options->routing);
       app.add_option("--task", options->tasks, "JSONL files: prompt/completion, choices, messages or text");
       app.add_option("--tokens", options->tokens, "safetensors file with input_ids, instead of --task: perplexity");
       app.add_option("--metric", options->metric, "auto, loss, perplexity, exact_match, multiple_choice")
           ->capture_default_str();
       app.add_option("--reference", options->reference, "model to compare with: KL, same top-1, perplexity ratio");
       app.add_option("--batch", options->batch, "sequences side by side; changes speed, never a number")
           ->capture_default_str();
       app.add_option("--limit", options->limit, "first records only (0 = all)")->capture_default_str();
       app.add_option("--context", options->context, "window (0 = max_position_embeddings)")->capture_default_str();
       app.add_option("--max-new-tokens", options->max_new_tokens, "exact_match (0 = longest answer + 8)")
           ->capture_default_str();
       app.add_option("--out", options->out, "JSON result file");
       app.add_flag("--samples", options->samples, "keep each record's output in the result file");
       app.add_flag("--truncate", options->truncate, "drop the oldest tokens of records longer than the context");
       app.add_flag("--skip-invalid", options->skip_invalid, "count bad records instead of stopping");
       app.add_flag("--no-hash", options->no_hash, "do not hash the model's files for the result");
       app.add_flag("--force", options->force, "replace the result file");
       return [options] { run_eval(*options); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
