#include "compress/stages.h"

#include <algorithm>
#include <cmath>

#include "compress/compressor.h"
#include "compress/measure.h"
#include "compress/recover.h"
#include "compress/stage_keys.h"
#include "compress/text.h"
#include "compress/weights.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/eval.h"
#include "model/training_data.h"
#include "runtime/version.h"

namespace lightmoe {
namespace {

namespace fs = std::filesystem;

// Whether the compression depends on what calibration found.
bool reads_statistics(const RecipeMethod& method) { return find_method(method.method).needs != Needs::kNothing; }

bool reads_all_outputs(const Method& method, const MethodOptions&) { return needs_all_outputs(method.needs); }

void add_version(RunResult& result, const std::string& version) {
  if (std::find(result.versions.begin(), result.versions.end(), version) == result.versions.end())
    result.versions.push_back(version);
}

// The steps of a training log.
void read_curve(const fs::path& file, RunResult& result) {
  if (!fs::exists(file)) return;
  const std::string text = read_file(file, int64_t{1} << 30);
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const Json line = parse_json(text.substr(begin, end - begin), fmt::format("{}:{}", file.string(), ++number));
    begin = end + 1;
    if (!line.contains("loss") || line.contains("event")) continue;
    TrainedStep step{.step = line.value("step", int64_t{0})};
    step.loss = line["loss"].is_number() ? line["loss"].get<double>() : std::nan("");
    step.beta = line.value("beta", 0.0);
    step.live_bytes = line.value("weight_bytes", int64_t{0});
    result.curve.push_back(step);
  }
}

}  // namespace

Stages::Stages(const Recipe& recipe, const RunnerOptions& options)
    : recipe_(recipe),
      options_(options),
      config_(read_config(recipe.model)),
      fingerprint_(model_fingerprint(Checkpoint(recipe.model))) {
  check(config_.lightmoe_json.empty(), ErrorKind::kInput, "{}: the recipe's model is compressed already", recipe.model);
  if (fs::exists(fs::path(recipe.model) / "tokenizer.json")) {
    tokenizer_ = std::make_unique<Tokenizer>(Tokenizer::load(recipe.model));
  }
}

const TaskData& Stages::data(size_t index) {
  const RecipeTask& task = recipe_.tasks[index];
  if (data_.name == task.name) return data_;
  data_ = {.name = task.name};
  data_.train = load_documents({task.train}, config_, tokenizer_.get(), false);
  data_.train_hash = hash_file(task.train);
  if (!task.validation.empty()) {
    data_.validation = load_documents({task.validation}, config_, tokenizer_.get(), false);
    data_.validation_hash = hash_file(task.validation);
  }
  data_.test_hash = hash_file(task.test);
  if (fs::path(task.test).extension() == ".safetensors") {
    for (Document& document : documents_from_tokens(task.test, config_.vocab_size))
      data_.test_ids.push_back(std::move(document.ids));
  } else {
    check(tokenizer_ != nullptr, ErrorKind::kInput, "{}: no tokenizer.json, but task {} is text", recipe_.model,
          task.name);
    data_.test = read_records(task.test, {}, nullptr);
  }
  return data_;
}

bool Stages::needs(bool (*what)(const Method&, const MethodOptions&)) const {
  return std::any_of(recipe_.methods.begin(), recipe_.methods.end(),
                     [what](const RecipeMethod& m) { return what(find_method(m.method), m.options); });
}

std::string Stages::statistics_key(size_t task) {
  const CalibrateOptions& c = recipe_.calibrate;
  return key_of({{"stage", "calibrate"},
                 {"model", fingerprint_},
                 {"data", data(task).train_hash},
                 {"tokens", c.tokens},
                 {"length", c.length},
                 {"sample", {c.sample_tokens, c.sample_length}},
                 {"seed", c.seed}});
}

void Stages::calibrate(size_t t) {
  const fs::path file = task_directory(t) / "statistics.safetensors", key_file = task_directory(t) / "statistics.key";
  fs::create_directories(task_directory(t));
  // What is collected beside does not change the rest: a method that joins the recipe leaves the others' stages as they are.
  const std::string key =
      key_of({{"statistics", statistics_key(t)},
              {"loss", "of labels"},
              {"needs", {needs(&reads_all_outputs), needs(&reads_inputs), needs(&reads_unit_gradients)}}});
  if (is_done(key_file, key) && fs::exists(file)) return;
  if (original_ == nullptr) original_ = load_model(recipe_.model, source_dtype());
  CalibrateOptions options = recipe_.calibrate;
  options.length = std::min(options.length, config_.max_position_embeddings);
  options.all_outputs = needs(&reads_all_outputs), options.sample_inputs = needs(&reads_inputs);
  options.unit_gradients = needs(&reads_unit_gradients);
  const CalibrationSet set = calibration_set(data(t).train, options);
  const Statistics statistics = lightmoe::calibrate(*original_, set, fingerprint_, options);
  save_statistics(statistics, file);
  write_file_atomically(key_file, key + "\n");
  int64_t starved = 0;
  for (const auto& slots : starved_slots(statistics)) starved += static_cast<int64_t>(slots.size());
  say(fmt::format("{}: calibrated on {} tokens, {} of {} experts without any", recipe_.tasks[t].name, set.tokens,
                  starved, config_.num_layers * config_.num_experts));
}

fs::path Stages::compressed_directory(const RunPlan& plan) const {
  const RecipeMethod& method = recipe_.methods[plan.method];
  const std::string name = method.name + (method.ratios.empty() ? "" : fmt::format("-r{:g}", 100 * plan.ratio));
  return (reads_statistics(method) ? task_directory(plan.task) : fs::path(recipe_.output) / "every.task") / name;
}

fs::path Stages::model_directory(const RunPlan& plan) const {
  const RecipeMethod& method = recipe_.methods[plan.method];
  if (trains(method)) return run_directory(plan) / "model";
  return find_method(method.method).compresses ? compressed_directory(plan) / "compressed" : fs::path(recipe_.model);
}

Stages::Keys Stages::keys_of(const RunPlan& plan) {
  const RecipeMethod& method = recipe_.methods[plan.method];
  const RecipeTask& task = recipe_.tasks[plan.task];
  const TaskData& files = data(plan.task);
  MethodOptions options = method.options;
  options.budget.value = plan.ratio;
  Json parts = {
      {"stage", "compress"}, {"model", fingerprint_}, {"method", method.method}, {"options", to_json(options)}};
  if (reads_statistics(method)) parts["statistics"] = statistics_key(plan.task);
  const Method& found = find_method(method.method);
  if (reads_unit_gradients(found, options) || found.needs == Needs::kTokens) parts["loss"] = "of labels";
  Keys keys{.compressed = key_of(parts), .model = {}, .result = {}};
  keys.model = keys.compressed;
  if (trains(method)) {
    keys.model = key_of({{"stage", "recover"},
                         {"compressed", keys.compressed},
                         {"training", to_json(training_of(plan))},
                         {"train", files.train_hash},
                         {"validation", files.validation_hash},
                         {"seed", plan.seed},
                         {"dtype", name_of(saved_dtype())}});
  } else if (!find_method(method.method).compresses) {
    keys.model = fingerprint_;
  }
  keys.result = key_of({{"stage", "evaluate"},
                        {"model", keys.model},
                        {"test", files.test_hash},
                        {"metric", task.metric},
                        {"limit", recipe_.eval_limit},
                        {"new_tokens", recipe_.eval_max_new_tokens}});
  return keys;
}

void Stages::compress(const RunPlan& plan, const std::string& key) {
  const RecipeMethod& method = recipe_.methods[plan.method];
  const fs::path directory = compressed_directory(plan);
  CompressJob job{
      .model = recipe_.model, .output = directory / "compressed", .method = method.method, .options = method.options};
  job.options.budget.value = plan.ratio;
  job.force = true;
  if (reads_statistics(method)) job.statistics = task_directory(plan.task) / "statistics.safetensors";
  fs::create_directories(directory);
  const StageLock lock(directory / "compressed.lock");
  if (is_done(directory / "compressed.key", key) && is_complete(job.output, false)) return;
  compress_model(job);
  write_file_atomically(directory / "compressed.key", key + "\n");
}

bool Stages::recover(const RunPlan& plan, const std::string& key) {
  const fs::path directory = run_directory(plan);
  if (is_done(directory / "model.key", key) && is_complete(directory / "model", false)) return true;
  // What another setting left here would be refused, not continued: it goes. The same setting, stopped, is continued.
  if (!is_done(directory / "training.key", key)) {
    fs::remove_all(directory / "checkpoints");
    write_file_atomically(directory / "training.key", key + "\n");
  }
  if (!fs::exists(directory / "checkpoints")) fs::remove(directory / "train.log.jsonl");
  if (!train_back(plan, training_of(plan))) return false;
  write_file_atomically(directory / "model.key", key + "\n");
  fs::remove_all(directory / "checkpoints");
  return true;
}

bool Stages::train_back(const RunPlan& plan, const RecipeTraining& t) {
  const TaskData& task = data(plan.task);
  const fs::path directory = run_directory(plan);
  const Method& method = find_method(recipe_.methods[plan.method].method);
  DataStream stream(task.train, {.rows = t.rows,
                                 .length = t.length,
                                 .pack = t.pack,
                                 .seed = static_cast<uint64_t>(plan.seed),
                                 .pad_id = static_cast<int32_t>(config_.pad_token_id.value_or(0)),
                                 .vocab_size = config_.vocab_size});
  // A direct method stays one, whatever [train] says about annealing.
  const double eps = method.anneal == 0 || t.router_kd ? 0 : t.anneal.value_or(method.anneal);
  OutputDirectory output(directory / "model", true, {fs::path(recipe_.model)});
  Recovery recovery(
      compressed_directory(plan) / "compressed", recipe_.model, t.steps,
      {.annealing = Annealing{.eps = eps, .shape = parse_anneal_shape(t.anneal_shape), .gamma = t.anneal_gamma},
       .distill = t.distill,
       .distill_temperature = t.distill_temperature,
       .seed = static_cast<uint64_t>(plan.seed),
       .merge = t.merge,
       .train_routers = t.entropy_coef > 0,
       .router_kd = t.router_kd,
       .extend = t.extend.empty() ? std::optional<ExtensionShape>() : parse_extension(t.extend)});
  TrainerOptions options = trainer_options(t, directory);
  options.fingerprint = recovery.fingerprint();
  TrainerHooks hooks = recovery.hooks(saved_dtype());
  hooks.save_model = nullptr;
  if (!task.validation.empty()) {
    hooks.evaluate = [&](int64_t) {
      const EvalResult found = evaluate_documents(recovery.model(), task.validation, {.batch = recipe_.eval_batch});
      return EvalPoint{.loss = found.value("loss")};
    };
    if (options.eval_every == 0) options.eval_every = t.steps;
  }
  reset_peak_memory();
  const TrainResult trained = train(recovery.trainable(), stream, options, hooks);
  if (trained.stopped_by_signal != 0) {
    stopped_by_ = exit_code_of(trained, false);
    return false;
  }
  const Json summary = {{"steps", trained.steps_done},
                        {"loss", trained.loss},
                        {"seconds", trained.seconds},
                        {"tokens", trained.tokens},
                        {"validation_loss", trained.eval_loss ? Json(*trained.eval_loss) : Json(nullptr)},
                        {"peak_bytes", memory_use_total().peak_bytes},
                        {"version", version()}};
  recovery.finish();
  recovery.save(output.path(), saved_dtype(), summary);
  output.commit();
  return true;
}

RecipeTraining Stages::training_of(const RunPlan& plan) const {
  RecipeTraining t = recipe_.methods[plan.method].training;
  const RecipeTask& task = recipe_.tasks[plan.task];
  t.steps = std::max<int64_t>(1, std::llround(static_cast<double>(t.steps) * task.steps_scale));
  t.lr *= task.lr_scale;
  return t;
}

TrainerOptions Stages::trainer_options(const RecipeTraining& t, const fs::path& directory) const {
  TrainerOptions o;
  o.steps = t.steps;
  o.accumulate = t.accumulate;
  o.schedule = {.kind = parse_schedule_kind(t.schedule),
                .peak_lr = t.lr,
                .total_steps = t.steps,
                .warmup_steps = parse_warmup(t.warmup, t.steps),
                .min_ratio = t.min_lr_ratio};
  o.schedule.check_valid();
  o.optimizer = {.beta1 = t.beta1,
                 .beta2 = t.beta2,
                 .weight_decay = t.weight_decay,
                 .clip_norm = t.clip,
                 .rule = no_decay_for_vectors};
  o.aux_coef = t.aux_coef;
  o.entropy_coef = t.entropy_coef;
  o.recompute = t.recompute;
  o.eval_every = t.eval_every;
  o.checkpoint = {.directory = directory / "checkpoints",
                  .save_every = t.save_every,
                  .keep = 1,
                  .save_best = false,
                  .resume = "auto",
                  .overwrite = true};
  o.progress = {.quiet = true, .print_every = 1 << 30, .log_file = directory / "train.log.jsonl"};
  return o;
}

// What compression and training left in the model's record.
void Stages::fill_training(const RunPlan& plan, RunResult& result) const {
  const fs::path model = model_directory(plan);
  const CompressionRecord record = read_record(model);
  for (const LayerPlan& layer : record.plan.layers) result.replaced.push_back(layer.replaced);
  if (!result.recovered) return add_version(result, record.version);
  result.trainable = record.trainable_parameters;
  result.rank = record.rank;
  const Json recovery = read_json_file((model / kRecordFile).string())["recovery"];
  add_version(result, record.version);
  add_version(result, recovery.value("version", "unknown"));
  result.steps = recovery.value("steps", int64_t{0});
  result.train_seconds = recovery.value("seconds", 0.0);
  result.trained_tokens = recovery.value("tokens", int64_t{0});
  result.peak_bytes = recovery.value("peak_bytes", int64_t{0});
  if (recovery["validation_loss"].is_number()) result.validation_loss = recovery["validation_loss"].get<double>();
  read_curve(run_directory(plan) / "train.log.jsonl", result);
}

void Stages::fill_evaluation(const RunPlan& plan, RunResult& result) {
  const RecipeTask& task = recipe_.tasks[plan.task];
  const TaskData& files = data(plan.task);
  const fs::path directory = model_directory(plan);
  const int64_t before = memory_use(MemoryCategory::kWeights).live_bytes;
  const std::unique_ptr<Olmoe> model = load_model(directory, source_dtype());
  result.live_bytes = memory_use(MemoryCategory::kWeights).live_bytes - before;
  result.parameters = model->num_parameters();
  result.original_parameters = model_size(config_).total();
  result.file_bytes = Checkpoint(directory).total_bytes();
  const EvalOptions options{.metric = parse_eval_metric(task.metric),
                            .batch = recipe_.eval_batch,
                            .limit = recipe_.eval_limit,
                            .max_new_tokens = recipe_.eval_max_new_tokens};
  const EvalResult found = files.test_ids.empty() ? lightmoe::evaluate(*model, *tokenizer_, files.test, options)
                                                  : evaluate_tokens(*model, files.test_ids, options);
  for (const MetricValue& m : found.metrics) result.metrics[m.name] = {m.value, m.std_error, m.higher_is_better};
  result.test_records = found.records;
  result.main_metric = found.main().name;
}

bool Stages::run(const RunPlan& plan, const std::string& position) {
  const RecipeMethod& method = recipe_.methods[plan.method];
  const fs::path directory = run_directory(plan), file = directory / "result.json";
  const Keys keys = keys_of(plan);
  if (fs::exists(file) && read_json_file(file.string()).value("key", "") == keys.result) return true;
  fs::create_directories(directory);
  RunResult result{.task = recipe_.tasks[plan.task].name,
                   .method = method.name,
                   .ratio = plan.ratio,
                   .recovered = trains(method),
                   .seed = plan.seed,
                   .key = keys.result};
  const bool changed = result.recovered || find_method(method.method).compresses;
  if (changed) compress(plan, keys.compressed);
  if (result.recovered && !recover(plan, keys.model)) return false;
  if (changed) fill_training(plan, result);
  fill_evaluation(plan, result);
  add_version(result, version());
  write_file_atomically(file, to_json(result).dump(1) + "\n");
  if (result.recovered && !recipe_.keep_models && !(recipe_.measure_speed && stands_for_its_row(plan)))
    fs::remove_all(directory / "model");
  std::string line = fmt::format("[{}] {}: {} {:.4g}, {}", position, plan.directory, result.main_metric,
                                 result.quality(), human_bytes(result.file_bytes));
  if (result.recovered) line += fmt::format(", {} steps in {:.0f} s", result.steps, result.train_seconds);
  say(line);
  return true;
}

void Stages::measure(const RunPlan& plan) {
  const fs::path directory = run_directory(plan), result = directory / "result.json", file = directory / "speed.json";
  const fs::path model = model_directory(plan);
  if (!fs::exists(result) || (model != recipe_.model && !is_complete(model, false))) return;
  const std::string key = read_json_file(result.string()).value("key", "");
  if (fs::exists(file) && read_json_file(file.string()).value("key", "") == key) return;
  const Speed speed = measure_speed(*load_model(model, source_dtype()));
  const Json json = {{"key", key},
                     {"version", version()},
                     {"prefill_tokens_per_second", speed.prefill_tokens_per_second},
                     {"decode_tokens_per_second", speed.decode_tokens_per_second}};
  write_file_atomically(file, json.dump(1) + "\n");
}

}  // namespace lightmoe
