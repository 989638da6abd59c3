#include "compress/prefetch.h"

#include <fmt/core.h>

#include <filesystem>

#include "cli/load.h"
#include "cli/verb.h"
#include "loaders/json.h"
#include "model/training_data.h"

namespace lightmoe::cli {
namespace {

struct Options {
  ModelOptions model;
  std::vector<std::string> data, tokens;
  PrefetchOptions prefetch;
  int64_t limit = 400;
  bool json = false;
};

void print(const PrefetchReport& report) {
  fmt::print("{:<7}", "layer");
  for (const char* kind : {"router", "linear"}) {
    for (const int64_t n : report.predicted) fmt::print("{:>14}", fmt::format("{} top {}", kind, n));
  }
  fmt::print("\n");
  for (const PrefetchLayer& layer : report.layers) {
    fmt::print("{:<7}", layer.layer);
    for (const double hits : layer.router_hits) fmt::print("{:>13.1f}%", 100 * hits);
    for (const double hits : layer.linear_hits) fmt::print("{:>13.1f}%", 100 * hits);
    fmt::print("\n");
  }
  fmt::print("share of the chosen experts that were predicted; fitted on {} tokens, counted on {} others\n",
             report.train_tokens, report.test_tokens);
}

Json to_json(const PrefetchReport& report) {
  Json json = {{"predicted", report.predicted},
               {"train_tokens", report.train_tokens},
               {"test_tokens", report.test_tokens},
               {"layers", Json::array()}};
  for (const PrefetchLayer& layer : report.layers) {
    json["layers"].push_back(
        {{"layer", layer.layer}, {"router_hits", layer.router_hits}, {"linear_hits", layer.linear_hits}});
  }
  return json;
}

void run_prefetch(const Options& o) {
  check(o.data.empty() != o.tokens.empty(), ErrorKind::kUsage, "give either --data or --tokens");
  check(o.limit >= 2, ErrorKind::kUsage, "--limit {}: expected at least 2 documents", o.limit);
  const LoadedModel loaded = load(o.model);
  const std::vector<std::string>& names = o.data.empty() ? o.tokens : o.data;
  std::vector<Document> documents =
      load_documents({names.begin(), names.end()}, loaded.model->config, loaded.tokenizer.get(), false);
  std::vector<std::vector<int32_t>> train, test;  // every other document, so that both see all of the data
  const auto most = std::min(documents.size(), static_cast<size_t>(o.limit));
  for (size_t i = 0; i < most; ++i) {
    Document& document = documents[i * documents.size() / most];
    const auto longest = static_cast<size_t>(loaded.model->config.max_position_embeddings);
    if (document.ids.size() > longest) document.ids.resize(longest);
    (i % 2 == 0 ? train : test).push_back(std::move(document.ids));
  }
  const PrefetchReport report = measure_prefetch(*loaded.model, train, test, o.prefetch);
  if (o.json)
    fmt::print("{}\n", to_json(report).dump(2));
  else
    print(report);
}

const RegisterVerb verb{
    {"prefetch", "Evaluation", "How well a layer's experts can be known before it runs",
     "lightmoe prefetch demo/base --data math.train.jsonl --ahead 1 --predict 4 8", [](Flags& app) -> VerbAction {
       auto o = std::make_shared<Options>();
       add_model_options(app, o->model);
       app.add_option("--data", o->data, "JSONL or text files");
       app.add_option("--tokens", o->tokens, "safetensors files with input_ids [N,S], instead of text");
       app.add_option("--ahead", o->prefetch.ahead, "layers between the hidden state and the experts predicted")
           ->capture_default_str();
       app.add_option("--predict", o->prefetch.predicted, "sizes of the predicted set (default: top-k, twice top-k)");
       app.add_option("--ridge", o->prefetch.ridge, "of the linear predictor's fit")->capture_default_str();
       app.add_option("--limit", o->limit, "documents, evenly taken; half to fit, half to test")->capture_default_str();
       app.add_flag("--json", o->json, "as JSON");
       return [o] { run_prefetch(*o); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
