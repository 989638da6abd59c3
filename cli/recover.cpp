#include "compress/recover.h"

#include <fmt/core.h>

#include <memory>

#include "cli/load.h"
#include "cli/training_flags.h"
#include "cli/verb.h"
#include "compress/text.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/eval.h"
#include "model/progress.h"

namespace lightmoe::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::string compressed, base, frozen_dtype = "f32", anneal_shape = "linear";
  std::optional<double> anneal;
  double anneal_gamma = 3;
  double distill = 0, distill_temperature = 1;
  bool no_merge = false, router_kd = false;
  std::string extend;
  double entropy_coef = 0;
  TrainingFlags training;
};

RecoveryOptions recovery_options(const Options& o, const OlmoeConfig& config, double default_eps) {
  Annealing annealing{
      .eps = o.anneal.value_or(default_eps), .shape = parse_anneal_shape(o.anneal_shape), .gamma = o.anneal_gamma};
  annealing.check_valid();
  return {.annealing = annealing,
          .distill = o.distill,
          .distill_temperature = o.distill_temperature,
          .seed = {},
          .merge = !o.no_merge,
          .train_routers = o.entropy_coef > 0,
          .router_kd = o.router_kd,
          .extend = o.extend.empty() ? std::optional<ExtensionShape>() : parse_extension(o.extend),
          .dtype = parse_dtype(o.frozen_dtype, config),
          .say = [](const std::string& line) { fmt::print(stderr, "{}\n", line); }};
}

void dry_run(const Options& o, const RecoveryOptions& options, const TrainerOptions& t, DType saved) {
  const TrainingFlags& f = o.training;
  const RecoveryEstimate e =
      estimate_recovery(o.compressed, options, saved, f.stream.rows * f.stream.length, t.recompute, t.compute);
  fmt::print("{}", to_text(e.training));
  if (e.original_bytes > 0) {
    fmt::print("originals       {} until step {:.0f} (annealing)\n", format_bytes(e.original_bytes),
               std::ceil(options.annealing->eps * static_cast<double>(t.steps)));
    fmt::print("peak memory     about {}\n", format_bytes(e.training.total_bytes() + e.original_bytes));
  }
  if (e.teacher_bytes > 0) {
    fmt::print("teacher         {}\n", format_bytes(e.teacher_bytes));
    fmt::print("peak memory     about {}\n", format_bytes(e.training.total_bytes() + e.teacher_bytes));
  }
  fmt::print("written         {} parameters, {} ({} bytes of tensors)\n", human_count(e.stored_parameters),
             format_bytes(e.stored_bytes), e.stored_bytes);
  fmt::print("steps           {} of {} tokens\n", t.steps, t.accumulate * f.stream.rows * f.stream.length);
}

Json result_json(const Options& o, const Recovery& recovery, const TrainResult& result) {
  const Annealing& a = recovery.annealing();
  Json json = {{"base", o.base},
               {"data", o.training.data.empty() ? o.training.tokens : o.training.data},
               {"steps", result.steps_done},
               {"skipped", result.skipped},
               {"loss", result.loss},
               {"anneal", a.eps},
               {"anneal_shape", o.anneal_shape},
               {"distill", o.distill},
               {"merged", !o.no_merge}};
  if (!o.extend.empty()) json["extension"] = o.extend;
  if (o.router_kd) json["router_kd"] = {{"temperature", o.distill_temperature}, {"kl", recovery.teacher_kl()}};
  if (result.eval_loss) json["eval_loss"] = *result.eval_loss;
  return json;
}

void run_recover(Options& o) {
  TrainingFlags& f = o.training;
  const OlmoeConfig config = read_config(o.compressed);
  const CompressionRecord record = read_record(o.compressed);
  const Method& method = find_method(record.method);
  check(o.router_kd || !o.extend.empty() || method.trainable != Trainable::kNothing, ErrorKind::kUsage,
        "{}: method \"{}\" trains nothing (--router-kd trains its routers, --extend an extension)", o.compressed,
        record.method);
  // The router is frozen unless everything trains: balancing it has no use then.
  const bool everything = method.trainable == Trainable::kEverything && !o.router_kd && o.extend.empty();
  TrainerOptions t = trainer_options(f, config, everything ? config.router_aux_loss_coef : 0.0);
  check(o.entropy_coef >= 0, ErrorKind::kUsage, "--entropy-coef {:g}: expected 0 or more", o.entropy_coef);
  t.entropy_coef = o.entropy_coef;
  const RecoveryOptions options = recovery_options(o, config, o.router_kd ? 0 : method.anneal);
  const DType saved = saved_dtype(f, config);
  if (f.dry_run) return dry_run(o, options, t, saved);
  std::unique_ptr<Tokenizer> tokenizer;
  if (fs::exists(fs::path(o.compressed) / "tokenizer.json")) {
    tokenizer = std::make_unique<Tokenizer>(Tokenizer::load(o.compressed));
  }
  DataStream data = open_data(f, config, tokenizer.get());
  const std::vector<Document> eval_documents = open_eval_data(f, config, tokenizer.get());
  const RecoveryEstimate estimate =
      estimate_recovery(o.compressed, options, saved, f.stream.rows * f.stream.length, t.recompute, t.compute);
  require_room_for_training(estimate.training, 0, estimate.original_bytes);
  OutputDirectory output(f.out, f.force, {fs::path(o.compressed), fs::path(o.base)});
  Recovery recovery(o.compressed, o.base, t.steps, options);
  t.fingerprint = recovery.fingerprint();
  TrainerHooks hooks = recovery.hooks(saved);
  if (!eval_documents.empty()) {
    hooks.evaluate = [&](int64_t) {
      const EvalOptions eval{.batch = f.eval_batch, .compute = t.compute};
      return EvalPoint{.loss = evaluate_documents(recovery.model(), eval_documents, eval).value("loss")};
    };
    if (t.eval_every == 0) t.eval_every = t.steps;
  }
  if (f.no_checkpoint_model) hooks.save_model = nullptr;
  const TrainResult result = train(recovery.trainable(), data, t, hooks);
  if (result.stopped_by_signal != 0) {
    set_exit_code(exit_code_of(result, f.requeue));
    return;
  }
  recovery.finish();
  recovery.save(output.path(), saved, result_json(o, recovery, result));
  output.commit();
  print_training_summary(f, result);
}

const RegisterVerb verb{
    {"recover", "Compression", "Train a compressed model back, the originals fading out",
     "lightmoe recover olmoe-math-50 --base OLMoE-1B-7B --data math.train.jsonl --steps 2000 --lr 1e-4 -o olmoe-math",
     [](Flags& app) -> VerbAction {
       auto o = std::make_shared<Options>();
       app.add_option("compressed", o->compressed, "directory that `compress` wrote")->required();
       app.add_option("--base", o->base, "the original model")->required();
       const std::string group = "Annealing";
       app.add_option("--anneal", o->anneal,
                      "eps of the paper: share of the steps until the originals are gone (default: the method's)")
           ->group(group);
       app.add_option("--anneal-shape", o->anneal_shape,
                      "linear, exponential, or adaptive: slower while the loss rises")
           ->group(group)
           ->capture_default_str();
       app.add_option("--anneal-gamma", o->anneal_gamma, "steepness of exponential")
           ->group(group)
           ->capture_default_str();
       app.add_option("--distill", o->distill,
                      "weight of the original model's output in the loss while it is in memory (not in the paper)")
           ->group(group)
           ->capture_default_str();
       app.add_option("--distill-temperature", o->distill_temperature, "of both outputs")
           ->group(group)
           ->capture_default_str();
       app.add_flag("--router-kd", o->router_kd,
                    "train the routers alone, towards the original's next tokens at --distill-temperature (2603.02217)")
           ->group(group);
       app.add_option(
              "--extend", o->extend,
              "train an extension of every MoE block, KIND or KIND:setting=number,.., instead of adapters and bases "
              "(train --help lists them)")
           ->group("Extension");
       app.add_flag("--no-merge", o->no_merge, "keep the adapters of experts that were not replaced")->group(group);
       app.add_option("--entropy-coef", o->entropy_coef,
                      "weight of the routers' entropy, which then train too: tokens need fewer experts (SEER-MoE)")
           ->group("Training")
           ->capture_default_str();
       app.add_option("--frozen-dtype", o->frozen_dtype, "frozen weights in memory: f32, bf16, auto")
           ->group("Training")
           ->capture_default_str();
       app.add_option("--compute", o->training.compute, "products: f32, or bf16 with f32 sums")
           ->group("Training")
           ->capture_default_str();
       o->training.trainer.optimizer.weight_decay = 0;
       add_training_flags(app, o->training);
       return [o] { run_recover(*o); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
