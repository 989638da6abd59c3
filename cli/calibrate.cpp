#include "compress/calibrate.h"

#include <filesystem>

#include "cli/load.h"
#include "cli/verb.h"
#include "compress/weights.h"
#include "model/training_data.h"

namespace lightmoe::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::string model, dtype = "auto", compute = "f32", out;
  std::vector<std::string> data, tokens, merge;
  CalibrateOptions calibrate;
  bool skip_invalid = false, force = false, quiet = false;
};

void check_output(const Options& o) {
  check(o.force || !fs::exists(o.out), ErrorKind::kUsage, "{} exists; --force replaces it", o.out);
  const fs::path parent = fs::absolute(o.out).parent_path();
  check(fs::is_directory(parent), ErrorKind::kUsage, "{}: no such directory", parent.string());
}

void merge(const Options& o) {
  check(o.model.empty() && o.data.empty() && o.tokens.empty(), ErrorKind::kUsage,
        "--merge takes statistics files alone, no model and no data");
  std::vector<Statistics> parts;
  for (const std::string& file : o.merge) parts.push_back(load_statistics(file));
  const Statistics merged = merge_statistics(parts);
  save_statistics(merged, o.out);
  fmt::print("{}wrote {}\n", coverage_table(merged), o.out);
}

void calibrate(Options& o) {
  check_output(o);
  if (!o.merge.empty()) return merge(o);
  check(!o.model.empty(), ErrorKind::kUsage, "a model directory is missing");
  check(o.data.empty() != o.tokens.empty(), ErrorKind::kUsage, "give either --data or --tokens");
  const OlmoeConfig config = read_config(o.model);
  std::unique_ptr<Tokenizer> tokenizer;
  if (fs::exists(fs::path(o.model) / "tokenizer.json"))
    tokenizer = std::make_unique<Tokenizer>(Tokenizer::load(o.model));
  const std::vector<std::string>& names = o.data.empty() ? o.tokens : o.data;
  DocumentsReport report;
  const std::vector<Document> documents =
      load_documents({names.begin(), names.end()}, config, tokenizer.get(), o.skip_invalid, &report);
  for (const std::string& problem : report.first_problems) fmt::print(stderr, "warning: skipped {}\n", problem);
  o.calibrate.compute = parse_compute(o.compute);
  o.calibrate.length = std::min(o.calibrate.length, config.max_position_embeddings);
  const CalibrationSet set = calibration_set(documents, o.calibrate);
  if (set.tokens < o.calibrate.tokens) {
    fmt::print(stderr, "the data have {} tokens, {} were asked for: all of them are used\n", set.tokens,
               o.calibrate.tokens);
  }
  const std::string fingerprint = model_fingerprint(Checkpoint(o.model));
  const LoadedModel loaded = load({o.model, o.dtype, o.compute});
  const Statistics statistics = calibrate(*loaded.model, set, fingerprint, o.calibrate, [&](int64_t done, int64_t all) {
    if (!o.quiet && done * 10 / all != (done - o.calibrate.batch_tokens) * 10 / all) {
      fmt::print(stderr, "{} of {} tokens\n", done, all);
    }
  });
  save_statistics(statistics, o.out);
  fmt::print("{}wrote {}\n", coverage_table(statistics), o.out);
}

const RegisterVerb verb{
    {"calibrate", "Compression", "Measure on task data which experts matter",
     "lightmoe calibrate OLMoE-1B-7B --data math.train.jsonl -o math.safetensors", [](Flags& app) -> VerbAction {
       auto o = std::make_shared<Options>();
       CalibrateOptions& c = o->calibrate;
       app.add_option("model", o->model, "original model directory");
       app.add_option("-o,--output", o->out, "statistics file to write")->required();
       app.add_option("--data", o->data, "JSONL or text files of the task");
       app.add_option("--tokens", o->tokens, "safetensors files with input_ids [N,S], instead of text");
       app.add_option("--merge", o->merge, "statistics files of the same model to add up, instead of a pass");
       app.add_option("--num-tokens", c.tokens, "tokens of the pass")->capture_default_str();
       app.add_option("--length", c.length, "longest piece of a document, tokens")->capture_default_str();
       app.add_option("--batch-tokens", c.batch_tokens, "tokens per forward pass")->capture_default_str();
       app.add_option("--sample-tokens", c.sample_tokens, "tokens whose router logits are kept")->capture_default_str();
       app.add_option("--sample-length", c.sample_length, "of those, at most so many of a document")
           ->capture_default_str();
       app.add_flag("--all-outputs", c.all_outputs,
                    "mean outputs over all tokens too (E/K times the work of the experts)");
       app.add_flag("--sample-inputs", c.sample_inputs,
                    "keep what the MoE blocks saw for the sampled tokens (methods that refit or factorise)");
       app.add_flag(
           "--unit-gradients", c.unit_gradients,
           "gradients of experts and of units inside them too (a backward pass; f32 gradients of all experts)");
       app.add_option("--seed", c.seed, "of the order of the documents")->capture_default_str();
       app.add_option("--dtype", o->dtype, "weights in memory: auto (as stored), f32, bf16")->capture_default_str();
       app.add_option("--compute", o->compute, "products: f32, or bf16 with f32 sums")->capture_default_str();
       app.add_flag("--skip-invalid", o->skip_invalid, "count bad lines instead of stopping at the first");
       app.add_flag("--force", o->force, "replace an existing file");
       app.add_flag("--quiet", o->quiet, "no progress");
       return [o] { calibrate(*o); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
