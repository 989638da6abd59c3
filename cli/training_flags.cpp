#include "cli/training_flags.h"

#include <fmt/core.h>

#include "cli/load.h"
#include "model/progress.h"
#include "model/training_data.h"
#include "runtime/error.h"

namespace lightmoe::cli {
namespace {

namespace fs = std::filesystem;

void add_data_options(Flags& app, TrainingFlags& o) {
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

void add_training_options(Flags& app, TrainingFlags& o) {
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

void add_output_options(Flags& app, TrainingFlags& o) {
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

std::vector<fs::path> paths(const std::vector<std::string>& names) { return {names.begin(), names.end()}; }

}  // namespace

void add_training_flags(Flags& app, TrainingFlags& flags) {
  add_data_options(app, flags);
  add_training_options(app, flags);
  add_output_options(app, flags);
}

TrainerOptions trainer_options(const TrainingFlags& o, const OlmoeConfig& config, double default_aux_coef) {
  TrainerOptions t = o.trainer;
  t.schedule.kind = parse_schedule_kind(o.schedule);
  t.schedule.total_steps = t.steps;
  t.schedule.warmup_steps = parse_warmup(o.warmup, t.steps);
  t.schedule.check_valid();
  t.optimizer.beta1 = o.betas[0];
  t.optimizer.beta2 = o.betas[1];
  if (!o.decay_all) t.optimizer.rule = no_decay_for_vectors;
  t.aux_coef = o.aux_coef < 0 ? default_aux_coef : o.aux_coef;
  t.compute = parse_compute(o.compute);
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

DType saved_dtype(const TrainingFlags& o, const OlmoeConfig& config) {
  return parse_dtype(o.save_dtype == "source" ? "auto" : o.save_dtype, config);
}

DataStream open_data(const TrainingFlags& o, const OlmoeConfig& config, const Tokenizer* tokenizer) {
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
  DataStream data(std::move(documents), stream);
  if (data.num_truncated() > 0)
    fmt::print(stderr, "warning: {} documents longer than a row, cut to {} tokens\n", data.num_truncated(),
               stream.length);
  return data;
}

std::vector<Document> open_eval_data(const TrainingFlags& o, const OlmoeConfig& config, const Tokenizer* tokenizer) {
  return load_documents(paths(o.eval_data), config, tokenizer, o.skip_invalid);
}

void print_training_summary(const TrainingFlags& o, const TrainResult& result) {
  fmt::print("{}: {} steps, loss {:.4f}", o.out, result.steps_done, result.loss);
  if (result.eval_loss)
    fmt::print(", eval loss {:.4f} (best {:.4f} at step {})", *result.eval_loss, *result.best_eval_loss,
               result.best_step);
  const double speed = result.seconds > 0 ? static_cast<double>(result.tokens) / result.seconds : 0;
  fmt::print(", {} tokens in {} ({:.0f}/s)\n", result.tokens, format_duration(result.seconds), speed);
}

}  // namespace lightmoe::cli
