#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "cli/load.h"
#include "cli/verb.h"
#include "compress/record.h"
#include "loaders/output.h"
#include "model/checkpoint.h"
#include "model/eval.h"
#include "model/parameter_patterns.h"
#include "model/progress.h"
#include "model/trainer.h"
#include "model/training_data.h"
#include "model/training_estimate.h"
#include "runtime/error.h"
#include "runtime/version.h"

namespace lightmoe::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  ModelOptions model{.dtype = "f32"};
  std::vector<std::string> data, tokens, eval_data;
  DataStream::Options stream;
  bool no_pack = false, no_shuffle = false, skip_invalid = false;
  TrainerOptions trainer;
  std::string schedule = "cosine", warmup = "0.03", recompute = "none";
  std::vector<double> betas = {0.9, 0.95};
  bool decay_all = false;
  double aux_coef = -1;
  std::vector<std::string> train_only, freeze;
  std::string out, checkpoint_directory, log, save_dtype = "source";
  int64_t eval_batch = 32;
  bool force = false, dry_run = false, requeue = false, no_checkpoint_model = false;
};

void add_data_options(CLI::App& app, Options& o) {
  const std::string group = "Data";
  app.add_option("--data", o.data, "JSONL or text files")->group(group);
  app.add_option("--tokens", o.tokens, "safetensors files with input_ids [N,S], instead of text")->group(group);
  app.add_option("--eval-data", o.eval_data, "files to measure the loss on (text or safetensors)")->group(group);
  app.add_option("--batch-rows", o.stream.rows, "rows of a micro-batch")->group(group)->capture_default_str();
  app.add_option("--length", o.stream.length, "tokens of a row")->group(group)->capture_default_str();
  app.add_option("--seed", o.stream.seed, "of the order of the data")->group(group)->capture_default_str();
  app.add_flag("--no-pack", o.no_pack, "one document a row")->group(group);
  app.add_flag("--no-shuffle", o.no_shuffle, "documents in file order")->group(group);
  app.add_flag("--truncate", o.stream.truncate, "cut documents that are longer than a row")->group(group);
  app.add_flag("--skip-invalid", o.skip_invalid, "count bad lines instead of stopping at the first")->group(group);
}

void add_training_options(CLI::App& app, Options& o) {
  const std::string group = "Training";
  TrainerOptions& t = o.trainer;
  app.add_option("--steps", t.steps, "optimizer steps")->required()->group(group);
  app.add_option("--accumulate", t.accumulate, "micro-batches of a step")->group(group)->capture_default_str();
  app.add_option("--lr", t.schedule.peak_lr, "peak learning rate")->group(group)->capture_default_str();
  app.add_option("--schedule", o.schedule, "constant, linear, cosine, wsd")->group(group)->capture_default_str();
  app.add_option("--warmup", o.warmup, "steps (100), ratio (0.03) or percentage (3%)")
      ->group(group)
      ->capture_default_str();
  app.add_option("--min-lr-ratio", t.schedule.min_ratio, "last rate over peak")->group(group)->capture_default_str();
  app.add_option("--decay-fraction", t.schedule.decay_fraction, "wsd: last part of the steps, in which the rate falls")
      ->group(group)
      ->capture_default_str();
  app.add_option("--weight-decay", t.optimizer.weight_decay, "decoupled decay")->group(group)->capture_default_str();
  app.add_flag("--decay-all", o.decay_all, "decay norm weights too")->group(group);
  app.add_option("--betas", o.betas, "AdamW moments")->expected(2)->group(group)->capture_default_str();
  app.add_option("--eps", t.optimizer.eps, "AdamW epsilon")->group(group)->capture_default_str();
  app.add_option("--clip", t.optimizer.clip_norm, "global gradient norm, 0 = off")->group(group)->capture_default_str();
  app.add_option("--aux-coef", o.aux_coef, "weight of the load-balancing loss (default: config.json)")->group(group);
  app.add_option("--train-only", o.train_only, "train only parameters with such names ('*.mlp.experts.*')")
      ->group(group);
  app.add_option("--freeze", o.freeze, "do not train parameters with such names ('*.mlp.gate.weight')")->group(group);
  app.add_option("--recompute", o.recompute, "none, moe, block: computed again in backward instead of kept")
      ->group(group)
      ->capture_default_str();
  app.add_option("--max-skips", t.max_consecutive_skips, "refused updates in a row that end the run")
      ->group(group)
      ->capture_default_str();
  app.add_option("--spike-window", t.spike.window, "refuse loss spikes judged over so many steps, 0 = off")
      ->group(group)
      ->capture_default_str();
  app.add_option("--spike-zscore", t.spike.max_zscore, "deviations above the mean that are a spike")
      ->group(group)
      ->capture_default_str();
  app.add_option("--eval-every", t.eval_every, "steps between evaluations")->group(group)->capture_default_str();
  app.add_option("--eval-batch", o.eval_batch, "rows of an evaluation pass")->group(group)->capture_default_str();
}

void add_output_options(CLI::App& app, Options& o) {
  const std::string group = "Output";
  CheckpointOptions& c = o.trainer.checkpoint;
  app.add_option("-o,--out", o.out, "model directory to write")->required()->group(group);
  app.add_flag("--force", o.force, "replace the output, its checkpoints and its log")->group(group);
  app.add_option("--save-dtype", o.save_dtype, "source, f32, bf16")->group(group)->capture_default_str();
  app.add_option("--checkpoints", o.checkpoint_directory, "directory of step checkpoints (default OUT.checkpoints)")
      ->group(group);
  app.add_option("--save-every", c.save_every, "steps between checkpoints, 0 = only when stopped")
      ->group(group)
      ->capture_default_str();
  app.add_option("--keep", c.keep, "checkpoints kept beside the best one")->group(group)->capture_default_str();
  app.add_flag("--no-checkpoint-model", o.no_checkpoint_model, "checkpoints hold the training state only")
      ->group(group);
  app.add_option("--resume", c.resume, "auto, or a checkpoint")->group(group);
  app.add_flag("--resume-anyway", c.resume_anyway, "go on although options, data or version differ")->group(group);
  app.add_flag("--requeue-exit-code", o.requeue, "exit with 75 when stopped by a signal")->group(group);
  app.add_option("--log", o.log, "JSONL log (default OUT.log.jsonl), none")->group(group);
  app.add_flag("--quiet", o.trainer.progress.quiet, "warnings only")->group(group);
  app.add_option("--print-every", o.trainer.progress.print_every, "steps between lines when not on a terminal")
      ->group(group)
      ->capture_default_str();
  app.add_flag("--dry-run", o.dry_run, "say what it would take, and stop")->group(group);
}

Recompute parse_recompute(const std::string& name) {
  check(name == "none" || name == "moe" || name == "block", ErrorKind::kUsage,
        "--recompute {}: expected none, moe or block", name);
  return name == "none" ? Recompute::kNone : name == "moe" ? Recompute::kMoe : Recompute::kBlock;
}

// Everything that can be said without a model.
TrainerOptions trainer_options(const Options& o, const OlmoeConfig& config) {
  TrainerOptions t = o.trainer;
  t.schedule.kind = parse_schedule_kind(o.schedule);
  t.schedule.total_steps = t.steps;
  t.schedule.warmup_steps = parse_warmup(o.warmup, t.steps);
  t.schedule.check_valid();
  t.optimizer.beta1 = o.betas[0];
  t.optimizer.beta2 = o.betas[1];
  if (!o.decay_all) t.optimizer.rule = no_decay_for_vectors;
  t.aux_coef = o.aux_coef < 0 ? config.router_aux_loss_coef : o.aux_coef;
  t.compute = parse_compute(o.model.compute);
  t.recompute = parse_recompute(o.recompute);
  const std::string beside = (fs::path(o.out) / "").parent_path().string();  // without a slash at its end
  t.checkpoint.directory = o.checkpoint_directory.empty() ? beside + ".checkpoints" : o.checkpoint_directory;
  t.checkpoint.overwrite = o.force;
  if (o.log != "none") t.progress.log_file = o.log.empty() ? beside + ".log.jsonl" : o.log;
  check(o.data.empty() != o.tokens.empty(), ErrorKind::kUsage, "give either --data or --tokens");
  check(t.eval_every == 0 || !o.eval_data.empty(), ErrorKind::kUsage, "--eval-every needs --eval-data");
  check(o.stream.rows >= 1 && o.stream.length >= 2, ErrorKind::kUsage,
        "--batch-rows {} --length {}: expected at least 1 row of 2 tokens", o.stream.rows, o.stream.length);
  check(o.stream.length <= config.max_position_embeddings, ErrorKind::kUsage,
        "--length {}: the model was made for {} positions (config.json: max_position_embeddings)", o.stream.length,
        config.max_position_embeddings);
  return t;
}

DType saved_dtype(const std::string& name, const OlmoeConfig& config) {
  return parse_dtype(name == "source" ? "auto" : name, config);
}

std::vector<fs::path> paths(const std::vector<std::string>& names) { return {names.begin(), names.end()}; }

DataStream open_data(const Options& o, const OlmoeConfig& config, const Tokenizer* tokenizer) {
  DocumentsReport report;
  std::vector<Document> documents =
      load_documents(paths(o.data.empty() ? o.tokens : o.data), config, tokenizer, o.skip_invalid, &report);
  for (const std::string& problem : report.first_problems) fmt::print(stderr, "warning: skipped {}\n", problem);
  DataStream::Options stream = o.stream;
  stream.pack = !o.no_pack;
  stream.shuffle = !o.no_shuffle;
  stream.vocab_size = config.vocab_size;
  stream.pad_id = static_cast<int32_t>(config.pad_token_id.value_or(0));
  if (!o.trainer.progress.quiet) {
    fmt::print(stderr, "data: {} documents ({} lines skipped), {} tokens, {} with loss\n", report.documents,
               report.skipped, report.tokens, report.loss_tokens);
  }
  return DataStream(std::move(documents), stream);
}

void write_model(const Olmoe& model, const Options& o, const fs::path& directory) {
  save_model(model, directory, saved_dtype(o.save_dtype, model.config), int64_t{5} << 30);
  copy_side_files(o.model.path, directory);
}

std::string training_record(const Options& o, const Fingerprint& fingerprint, const TrainResult& result) {
  Json json = {{"program", "lightmoe"}, {"version", version()}, {"verb", "train"}, {"model", o.model.path}};
  json["data"] = o.data.empty() ? o.tokens : o.data;
  json["run"] = fingerprint;
  Json& r = json["result"];
  r = {{"steps", result.steps_done}, {"skipped", result.skipped}, {"loss", result.loss}};
  if (result.eval_loss) r["eval_loss"] = *result.eval_loss;
  if (result.best_eval_loss) r["best_eval_loss"] = *result.best_eval_loss, r["best_step"] = result.best_step;
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

void run_train(const Options& o) {
  const OlmoeConfig config = read_config(o.model.path);
  TrainerOptions t = trainer_options(o, config);
  std::unique_ptr<Tokenizer> tokenizer;
  if (fs::exists(fs::path(o.model.path) / "tokenizer.json")) {
    tokenizer = std::make_unique<Tokenizer>(Tokenizer::load(o.model.path));
  }
  DataStream data = open_data(o, config, tokenizer.get());
  const std::vector<Document> eval_documents =
      load_documents(paths(o.eval_data), config, tokenizer.get(), o.skip_invalid);

  std::unique_ptr<OutputDirectory> output;
  if (!o.dry_run) output = std::make_unique<OutputDirectory>(o.out, o.force, std::vector<fs::path>{o.model.path});
  LoadedModel loaded = load(o.model);
  Olmoe& model = *loaded.model;
  select_trainable(model.parameters(), o.train_only, o.freeze);
  const TrainingEstimate estimate =
      estimate_training(config, model.parameters(), o.stream.rows * o.stream.length, t.recompute);
  if (o.dry_run) {
    fmt::print("{}steps           {} of {} tokens\n", to_text(estimate), t.steps,
               t.accumulate * o.stream.rows * o.stream.length);
    return;
  }
  t.fingerprint["model"] = model_hash(o.model.path);
  TrainerHooks hooks;
  if (!eval_documents.empty()) {
    hooks.evaluate = [&](int64_t) {
      const EvalResult result =
          evaluate_documents(model, eval_documents, {.batch = o.eval_batch, .compute = t.compute});
      return EvalPoint{.loss = result.value("loss")};
    };
    if (t.eval_every == 0) t.eval_every = t.steps;
  }
  if (!o.no_checkpoint_model) hooks.save_model = [&](const fs::path& directory) { write_model(model, o, directory); };
  TrainableOlmoe trainable(model);
  const TrainResult result = train(trainable, data, t, hooks);
  if (result.stopped_by_signal != 0) {
    set_exit_code(exit_code_of(result, o.requeue));
    return;
  }
  write_model(model, o, output->path());
  write_file_atomically(output->path() / "training.json",
                        training_record(o, make_fingerprint(model.parameters(), data.fingerprint(), t), result));
  output->commit();
  fmt::print("{}: {} steps, loss {:.4f}", o.out, result.steps_done, result.loss);
  if (result.eval_loss)
    fmt::print(", eval loss {:.4f} (best {:.4f} at step {})", *result.eval_loss, *result.best_eval_loss,
               result.best_step);
  const double speed = result.seconds > 0 ? static_cast<double>(result.tokens) / result.seconds : 0;
  fmt::print(", {} tokens in {} ({:.0f}/s)\n", result.tokens, format_duration(result.seconds), speed);
}

const RegisterVerb verb{
    {"train", "Training", "Train a model on text or token ids, resumable bit for bit",
     "lightmoe train demo/base --data train.jsonl --steps 500 --lr 1e-3 --out trained --save-every 100 --resume auto",
     [](CLI::App& app) -> VerbAction {
       auto options = std::make_shared<Options>();
       add_model_options(app, options->model);
       add_data_options(app, *options);
       add_training_options(app, *options);
       add_output_options(app, *options);
       return [options] { run_train(*options); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
