#include <fmt/core.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "cli/extension_flags.h"
#include "cli/load.h"
#include "cli/training_flags.h"
#include "cli/verb.h"
#include "compress/orthogonal.h"
#include "compress/record.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/checkpoint.h"
#include "model/eval.h"
#include "model/parameter_patterns.h"
#include "model/trainer.h"
#include "model/training_estimate.h"
#include "runtime/error.h"
#include "runtime/version.h"

namespace lightmoe::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  ModelOptions model{.dtype = "f32"};
  TrainingFlags training;
  std::vector<std::string> train_only, freeze;
  int64_t orthogonal_every = 0;
  ExtensionFlags extension;
  double sparsity_coef = 0;
};

void write_model(const Olmoe& model, const Options& o, const fs::path& directory) {
  save_model(model, directory, saved_dtype(o.training, model.config), int64_t{5} << 30);
  copy_side_files(o.model.path, directory);
}

std::string training_record(const Options& o, const Fingerprint& fingerprint, const TrainResult& result) {
  Json json = {{"program", "lightmoe"}, {"version", version()}, {"verb", "train"}, {"model", o.model.path}};
  json["data"] = o.training.data.empty() ? o.training.tokens : o.training.data;
  json["run"] = fingerprint;
  Json& r = json["result"];
  r = {{"steps", result.steps_done}, {"skipped", result.skipped}, {"loss", result.loss}};
  if (result.eval_loss) r["eval_loss"] = *result.eval_loss;
  if (result.best_eval_loss) r["best_eval_loss"] = *result.best_eval_loss, r["best_step"] = result.best_step;
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

void run_train(Options& o) {
  const OlmoeConfig config = read_config(o.model.path);
  TrainingFlags& f = o.training;
  f.compute = o.model.compute;
  TrainerOptions t = trainer_options(f, config, config.router_aux_loss_coef);
  check(o.orthogonal_every >= 0, ErrorKind::kUsage, "--orthogonal-every {}: expected 0 (none) or more",
        o.orthogonal_every);
  check(o.sparsity_coef >= 0, ErrorKind::kUsage, "--sparsity-coef {:g}: expected 0 or more", o.sparsity_coef);
  t.sparsity_coef = o.sparsity_coef;
  std::unique_ptr<Tokenizer> tokenizer;
  if (fs::exists(fs::path(o.model.path) / "tokenizer.json")) {
    tokenizer = std::make_unique<Tokenizer>(Tokenizer::load(o.model.path));
  }
  DataStream data = open_data(f, config, tokenizer.get());
  const std::vector<Document> eval_documents = open_eval_data(f, config, tokenizer.get());

  std::unique_ptr<OutputDirectory> output;
  if (!f.dry_run) output = std::make_unique<OutputDirectory>(f.out, f.force, std::vector<fs::path>{o.model.path});
  LoadedModel loaded = load(o.model);
  Olmoe& model = *loaded.model;
  extend(model, o.extension, f.stream.seed);
  select_trainable(model.parameters(), o.train_only, o.freeze);
  const TrainingEstimate estimate = estimate_training(config, model.parameters(), f.stream.rows * f.stream.length,
                                                      t.recompute, StepExecution::of_this_process(t.compute));
  if (f.dry_run) {
    fmt::print("{}steps           {} of {} tokens\n", to_text(estimate), t.steps,
               t.accumulate * f.stream.rows * f.stream.length);
    return;
  }
  require_room_for_training(estimate, estimate.fixed.weight_bytes);
  t.fingerprint["model"] = model_hash(o.model.path);
  if (!o.extension.extend.empty()) t.fingerprint["extension"] = o.extension.extend + " " + o.extension.clusters;
  if (o.sparsity_coef != 0) t.fingerprint["sparsity"] = fmt::format("{:g}", o.sparsity_coef);
  TrainerHooks hooks;
  if (!eval_documents.empty()) {
    hooks.evaluate = [&](int64_t) {
      const EvalResult result =
          evaluate_documents(model, eval_documents, {.batch = f.eval_batch, .compute = t.compute});
      return EvalPoint{.loss = result.value("loss")};
    };
    if (t.eval_every == 0) t.eval_every = t.steps;
  }
  if (!f.no_checkpoint_model) hooks.save_model = [&](const fs::path& directory) { write_model(model, o, directory); };
  std::unique_ptr<TrainableOlmoe> trainable = std::make_unique<TrainableOlmoe>(model);
  if (o.orthogonal_every != 0) {
    auto orthogonal = std::make_unique<OrthogonalOlmoe>(model, o.orthogonal_every);
    hooks.before_step = [projecting = orthogonal.get()](int64_t step) { projecting->before_step(step); };
    t.fingerprint["orthogonal"] = std::to_string(o.orthogonal_every);
    trainable = std::move(orthogonal);
  }
  const TrainResult result = train(*trainable, data, t, hooks);
  if (result.stopped_by_signal != 0) {
    set_exit_code(exit_code_of(result, f.requeue));
    return;
  }
  write_model(model, o, output->path());
  write_file_atomically(output->path() / "training.json",
                        training_record(o, make_fingerprint(model.parameters(), data.fingerprint(), t), result));
  output->commit();
  print_training_summary(o.training, result);
}

const RegisterVerb verb{
    {"train", "Training", "Train a model on text or token ids, resumable bit for bit",
     "lightmoe train demo/base --data train.jsonl --steps 500 --lr 1e-3 --out trained --save-every 100 --resume auto",
     [](Flags& app) -> VerbAction {
       auto options = std::make_shared<Options>();
       add_model_options(app, options->model);
       add_training_flags(app, options->training);
       const std::string group = "Training";
       app.add_option("--train-only", options->train_only, "train only parameters with such names ('*.mlp.experts.*')")
           ->group(group);
       app.add_option("--freeze", options->freeze, "do not train parameters with such names ('*.mlp.gate.weight')")
           ->group(group);
       add_extension_flags(app, options->extension);
       app.add_option(
              "--sparsity-coef", options->sparsity_coef,
              "weight of the mean openness of blocks of units (extension dsmoe): closes those that are not needed")
           ->group("Extension")
           ->capture_default_str();
       app.add_option("--orthogonal-every", options->orthogonal_every,
                      "steps between those whose expert gradients are orthogonal to the other experts (OMoE; 0 = none)")
           ->group(group)
           ->capture_default_str();
       return [options] { run_train(*options); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
