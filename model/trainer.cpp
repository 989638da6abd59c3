#include "model/trainer.h"

#include <chrono>
#include <cmath>
#include <memory>
#include <utility>

#include "loaders/json.h"
#include "loaders/output.h"
#include "model/checkpoint.h"
#include "model/progress.h"
#include "model/trainer_guard.h"
#include "model/trainer_signals.h"
#include "runtime/trace.h"
#include "runtime/version.h"

namespace lightmoe {
namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Training {
 public:
  Training(TrainableModel& model, DataStream& data, const TrainerOptions& options, const TrainerHooks& hooks)
      : model_(model),
        data_(data),
        options_(with_total_steps(options)),
        hooks_(hooks),
        optimizer_(model.parameters(), options_.optimizer),
        guard_(options_.spike) {
    options_.schedule.check_valid();
    check(options_.accumulate >= 1, ErrorKind::kUsage, "--accumulate {}: expected at least 1", options_.accumulate);
    check(options_.max_consecutive_skips >= 1, ErrorKind::kUsage, "--max-skips {}: expected at least 1",
          options_.max_consecutive_skips);
    check(options_.eval_every >= 0 && options_.checkpoint.save_every >= 0, ErrorKind::kUsage,
          "--eval-every {} --save-every {}: expected numbers >= 0", options_.eval_every,
          options_.checkpoint.save_every);
  }

  TrainResult run();

 private:
  static TrainerOptions with_total_steps(TrainerOptions options) {
    options.schedule.total_steps = options.steps;
    return options;
  }
  void start();
  void resume(const CheckpointStore::Found& found);
  void report_start();
  void warn_of_full_disk(const TrainingMemory& memory);
  void one_step(int64_t step);
  StepStats forward_backward(int64_t step);
  void update(StepStats& stats);
  void give_up(const StepStats& stats) const;
  void log_step(const StepStats& stats);
  void evaluate_if_due();
  void save();
  void save_if_due();
  void log(Json line);
  void warn(const std::string& text);
  void release_gradients();

  TrainableModel& model_;
  DataStream& data_;
  TrainerOptions options_;
  const TrainerHooks& hooks_;
  TrainerSignals signals_;
  Optimizer optimizer_;
  StepGuard guard_;
  TrainingState state_;
  TrainResult result_;
  std::unique_ptr<CheckpointStore> store_;
  std::unique_ptr<TrainingLog> log_;
  std::unique_ptr<ProgressLine> progress_;
};

void Training::warn(const std::string& text) {
  if (progress_)
    progress_->warning(text);
  else
    ProgressLine::standard_error().write("warning: " + text + "\n");
}

void Training::log(Json line) {
  if (const auto problem = log_->append(line)) warn(*problem);
}

TrainResult Training::run() {
  const double begin = seconds_now();
  start();
  evaluate_if_due();  // a resumed run may have been stopped before its evaluation
  while (state_.step < options_.steps && signals_.stop_signal() == 0) {
    one_step(state_.step + 1);
    if (signals_.stop_signal() == 0) evaluate_if_due();
    save_if_due();
  }
  result_.stopped_by_signal = signals_.stop_signal();
  if (result_.stopped_by_signal != 0) {
    progress_->note(fmt::format("stopped by signal {} after step {}{}", result_.stopped_by_signal, state_.step,
                                store_->enabled() ? "; --resume auto goes on from there" : ""));
  }
  release_gradients();
  result_.steps_done = state_.step;
  result_.skipped = state_.skipped;
  result_.loss = state_.loss;
  result_.eval_loss = state_.eval_loss;
  result_.best_eval_loss = state_.best_eval_loss;
  result_.best_step = state_.best_step;
  result_.seconds = seconds_now() - begin;
  return result_;
}

void Training::start() {
  store_ = std::make_unique<CheckpointStore>(options_.checkpoint, [this](const std::string& text) { warn(text); });
  if (store_->enabled()) state_.fingerprint = make_fingerprint(optimizer_.parameters(), data_.fingerprint(), options_);
  const std::optional<CheckpointStore::Found> found = store_->find(state_.fingerprint);
  // With resume asked for and no checkpoint yet, the log of the run that did not get that far starts again.
  const bool may_replace_log = options_.checkpoint.overwrite || !options_.checkpoint.resume.empty();
  log_ = std::make_unique<TrainingLog>(options_.progress.log_file, found ? found->state.step : 0, may_replace_log);
  if (found)
    resume(*found);
  else
    store_->start_anew();
  result_.first_step = state_.step + 1;
  progress_ = std::make_unique<ProgressLine>(options_.progress, options_.steps, result_.first_step);
  report_start();
}

void Training::resume(const CheckpointStore::Found& found) {
  check(found.state.step <= options_.steps, ErrorKind::kResume, "{}: is at step {}, beyond --steps {}",
        found.directory.string(), found.state.step, options_.steps);
  store_->restore(found, optimizer_);
  const Fingerprint now = std::move(state_.fingerprint);
  state_ = found.state;
  state_.fingerprint = now;
  data_.seek(state_.data);
  guard_.restore(state_.losses, state_.norms);
  if (hooks_.load_extra) hooks_.load_extra(state_.extra);
}

void Training::report_start() {
  const TrainingMemory memory = training_memory(optimizer_.parameters());
  check(memory.trainable > 0, ErrorKind::kUsage, "no parameter is trainable: nothing to do");
  progress_->note(fmt::format("{} of {} parameters train; weights {}, gradients {}, optimizer {}", memory.trainable,
                              memory.parameters, format_bytes(memory.weight_bytes), format_bytes(memory.gradient_bytes),
                              format_bytes(memory.optimizer_bytes)));
  warn_of_full_disk(memory);
  if (state_.step > 0) progress_->note(fmt::format("resumed after step {}", state_.step));
  Json line = {{"event", state_.step > 0 ? "resume" : "start"},
               {"step", state_.step},
               {"steps", options_.steps},
               {"version", version()},
               {"parameters", memory.parameters},
               {"trainable", memory.trainable}};
  line["weight_bytes"] = memory.weight_bytes;
  line["gradient_bytes"] = memory.gradient_bytes;
  line["optimizer_bytes"] = memory.optimizer_bytes;
  log(std::move(line));
}

void Training::warn_of_full_disk(const TrainingMemory& memory) {
  if (!store_->enabled()) return;
  const int64_t trained = memory.gradient_bytes;  // a trained weight takes what its gradient takes, or less
  const int64_t one = trained + memory.optimizer_bytes + (hooks_.save_model ? memory.weight_bytes : 0);
  const int64_t room = one * (options_.checkpoint.keep + 2);  // the best one, and the new one before the oldest goes
  const auto free = static_cast<int64_t>(free_bytes(options_.checkpoint.directory));
  if (free > 0 && free < room) {
    warn(fmt::format("{}: {} free; a checkpoint takes up to {}, {} of them {}", options_.checkpoint.directory.string(),
                     format_bytes(free), format_bytes(one), options_.checkpoint.keep + 2, format_bytes(room)));
  }
}

void Training::one_step(int64_t step) {
  profile_step(step);
  const TraceRange range(TraceLevel::kStep, "step", step);
  const double begin = seconds_now();
  if (hooks_.before_step) hooks_.before_step(step);
  StepStats stats = forward_backward(step);
  update(stats);
  stats.seconds = seconds_now() - begin;
  state_.step = step;
  state_.data = data_.position();
  result_.tokens += stats.tokens;
  if (hooks_.after_step) hooks_.after_step(stats);
  progress_->step(stats);
  log_step(stats);
  give_up(stats);
}

StepStats Training::forward_backward(int64_t step) {
  StepStats stats;
  stats.step = step;
  stats.lr = options_.schedule.lr(step);
  std::vector<TokenRows> micro_batches;
  {
    const TraceRange range(TraceLevel::kPhase, "data");
    stats.epoch = data_.position().epoch;
    for (int64_t i = 0; i < options_.accumulate; ++i) {
      micro_batches.push_back(data_.next());
      check(micro_batches.back().rows > 0, ErrorKind::kInput, "step {}: the data are used up (they do not repeat)",
            step);
      stats.tokens += static_cast<int64_t>(micro_batches.back().ids.size());
      stats.labels += micro_batches.back().num_labels;
    }
  }
  const TrainOptions options{.compute = options_.compute,
                             .loss_scale = stats.labels > 0 ? 1.0 / static_cast<double>(stats.labels) : 0,
                             .aux_coef = options_.aux_coef,
                             .aux_scale = 1.0 / static_cast<double>(options_.accumulate),
                             .recompute = options_.recompute,
                             .entropy_coef = options_.entropy_coef,
                             .sparsity_coef = options_.sparsity_coef};
  double ce_sum = 0;
  optimizer_.zero_grad();
  for (const TokenRows& rows : micro_batches) {
    const TrainLosses losses = model_.forward_backward(to_batch(rows), options);
    require(losses.labels == rows.num_labels, "micro-batch of step {}: {} labels in the data, {} in the model", step,
            rows.num_labels, losses.labels);
    ce_sum += losses.ce_sum;
    stats.aux += losses.aux * options.aux_scale;
    stats.entropy += losses.entropy * options.aux_scale;
    stats.open += losses.open * options.aux_scale;
  }
  stats.loss = ce_sum * options.loss_scale;
  return stats;
}

void Training::update(StepStats& stats) {
  const TraceRange range(TraceLevel::kPhase, "optimizer");
  stats.grad_norm = optimizer_.gradient_norm();
  const bool has_labels = stats.labels > 0;
  stats.skipped = has_labels ? guard_.judge(stats.loss + options_.aux_coef * stats.aux, stats.grad_norm) : "no labels";
  state_.losses = guard_.losses();
  state_.norms = guard_.norms();
  if (!stats.skipped.empty()) {
    ++state_.skipped;
    if (has_labels) ++state_.consecutive_skips;
    return;
  }
  optimizer_.step(stats.lr, stats.grad_norm);
  state_.updates = optimizer_.updates();
  state_.consecutive_skips = 0;
  state_.loss = stats.loss;
}

void Training::give_up(const StepStats& stats) const {
  if (state_.consecutive_skips < options_.max_consecutive_skips) return;
  const std::string good = store_->last_good().empty()
                               ? "there is no checkpoint; the weights were not changed by the skipped steps"
                               : "last good checkpoint: " + store_->last_good().string();
  fail(ErrorKind::kNumeric, "step {}: {} ({} updates skipped in a row); {}", stats.step, stats.skipped,
       state_.consecutive_skips, good);
}

void Training::log_step(const StepStats& stats) {
  Json line = {{"step", stats.step},           {"loss", stats.loss},       {"aux", stats.aux},
               {"grad_norm", stats.grad_norm}, {"lr", stats.lr},           {"tokens", stats.tokens},
               {"labels", stats.labels},       {"seconds", stats.seconds}, {"epoch", stats.epoch}};
  if (options_.entropy_coef != 0) line["router_entropy"] = stats.entropy;
  if (options_.sparsity_coef != 0) line["open"] = stats.open;
  line["live_bytes"] = memory_use_total().live_bytes;
  line["peak_bytes"] = memory_use_total().peak_bytes;
  if (!stats.skipped.empty()) line["skipped"] = stats.skipped;
  if (hooks_.log_fields) line.update(hooks_.log_fields(stats));
  log(std::move(line));
}

void Training::evaluate_if_due() {
  const int64_t step = state_.step;
  const bool is_due =
      options_.eval_every > 0 && step > 0 && (step % options_.eval_every == 0 || step == options_.steps);
  if (!hooks_.evaluate || !is_due || state_.evaluated_step == step) return;
  const TraceRange range(TraceLevel::kPhase, "evaluate");
  const EvalPoint point = hooks_.evaluate(step);
  if (stop_requested()) return;  // it may have returned early; the continuation evaluates again
  state_.evaluated_step = step;
  const bool is_number = std::isfinite(point.loss);
  if (is_number) state_.eval_loss = point.loss;
  const bool is_best = is_number && (!state_.best_eval_loss || point.loss < *state_.best_eval_loss);
  if (is_best) {
    state_.best_eval_loss = point.loss;
    state_.best_step = step;
  }
  progress_->evaluation(step, point, is_best);
  Json line = {{"event", "eval"}, {"step", step}, {"loss", point.loss}, {"best", is_best}};
  for (const auto& [name, value] : point.metrics) line[name] = value;
  log(std::move(line));
}

void Training::save_if_due() {
  const CheckpointOptions& c = options_.checkpoint;
  const int64_t step = state_.step;
  const bool is_best = c.save_best && state_.best_step == step;
  const bool is_due = (c.save_every > 0 && step % c.save_every == 0) || (c.save_last && step == options_.steps);
  if (signals_.take_save_request() || signals_.stop_signal() != 0 || is_best || is_due) save();
}

void Training::save() {
  if (!store_->enabled()) return;
  const TraceRange range(TraceLevel::kPhase, "save");
  const double begin = seconds_now();
  if (hooks_.save_extra) state_.extra = hooks_.save_extra();
  store_->save(state_, optimizer_, hooks_.save_model);
  progress_->note(fmt::format("step {}: saved {} in {}", state_.step, store_->last_good().string(),
                              format_duration(seconds_now() - begin)));
  log({{"event", "save"}, {"step", state_.step}, {"directory", store_->last_good().string()}});
}

void Training::release_gradients() {
  for (const ParameterPtr& p : optimizer_.parameters()) p->grad.reset();
}

}  // namespace

Batch to_batch(const TokenRows& rows) {
  Batch batch = make_packed_batch(rows.ids, rows.labels, rows.positions, rows.doc_begin);
  if (!rows.mask.empty()) batch.mask = Tensor::from(rows.mask, {static_cast<int64_t>(rows.mask.size())});
  return batch;
}

int exit_code_of(const TrainResult& result, bool requeue) {
  if (result.stopped_by_signal == 0) return 0;
  return requeue ? 75 : 128 + result.stopped_by_signal;
}

TrainResult train(TrainableModel& model, DataStream& data, const TrainerOptions& options, const TrainerHooks& hooks) {
  return Training(model, data, options, hooks).run();
}

}  // namespace lightmoe
