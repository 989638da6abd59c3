#pragma once
// The training loop. One step: `accumulate` micro-batches are drawn, their unmasked labels counted first, then
//   loss = sum of CE over all labels of the step / their number + aux_coef * mean of the micro-batches' aux
//          (+ entropy_coef * mean of the micro-batches' router entropy + sparsity_coef * mean of their blocks' openness)
// is differentiated, clipped by global norm and applied by AdamW. Same numbers however the step is cut into micro-batches.
// With a checkpoint directory the loop saves every n steps, keeps the last k (and the best), and `resume` continues bit for bit:
// weights, moments, counters, data position, loss window, hooks' extra state. There is no other random state: shuffling and
// everything a hook draws must be functions of (seed, step).
// Signals while training: SIGTERM, SIGINT, SIGHUP finish the step, save and return (a second one exits at once);
// SIGUSR1 saves after the step. A step whose loss or gradient norm is not finite (or, by rule, spikes) is not applied.

#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "autograd/optimizer.h"
#include "autograd/schedule.h"
#include "loaders/dataset.h"
#include "loaders/json_type.h"
#include "model/olmoe.h"

namespace lightmoe {

// What the loop needs of a model.
class TrainableModel {
 public:
  virtual ~TrainableModel() = default;
  virtual std::vector<ParameterPtr> parameters() const = 0;  // the same ones, in the same order, for the whole run
  virtual TrainLosses forward_backward(const Batch& batch, const TrainOptions& options) = 0;
};
class TrainableOlmoe : public TrainableModel {
 public:
  explicit TrainableOlmoe(Olmoe& model) : model_(model) {}
  std::vector<ParameterPtr> parameters() const override { return model_.parameters(); }
  TrainLosses forward_backward(const Batch& batch, const TrainOptions& options) override {
    return model_.forward_backward(batch, options);
  }

 private:
  Olmoe& model_;
};
Batch to_batch(const TokenRows& rows);

struct SpikeRule {
  int64_t window = 0;     // accepted steps remembered; 0 = rule off
  double max_zscore = 6;  // of the loss or of the gradient norm, upwards
};

struct CheckpointOptions {
  std::filesystem::path directory;  // holds step-00000100/ ...; empty: no checkpoints
  int64_t save_every = 0;           // 0: only on signals and at the end
  int64_t keep = 2;                 // last k; the best one is kept besides
  bool save_best = true;            // a new best evaluation is saved at once
  bool save_last = false;           // also after the last step
  std::string resume;  // "" start anew, "auto" newest good one if any, else a step directory or a directory of them
  bool resume_anyway = false;  // go on although the fingerprint differs
  bool overwrite = false;  // starting anew in a directory that holds checkpoints: set them aside instead of refusing
};

struct ProgressOptions {
  bool quiet = false;              // nothing on stderr but warnings
  int64_t print_every = 10;        // lines when stderr is no terminal
  std::filesystem::path log_file;  // JSONL, one object a step; empty: none
};

struct TrainerOptions {
  int64_t steps = 0;
  int64_t accumulate = 1;
  Schedule schedule;  // total_steps is set from `steps`
  OptimizerOptions optimizer;
  double aux_coef = 0;
  double entropy_coef = 0;   // of the router's entropy (SEER-MoE, arXiv 2404.05089): tokens learn to need fewer experts
  double sparsity_coef = 0;  // of open blocks of units (DSMoE, arXiv 2502.12455)
  GemmCompute compute = GemmCompute::kF32;
  Recompute recompute = Recompute::kNone;
  int64_t eval_every = 0;  // needs hooks.evaluate; also after the last step. 0: never
  SpikeRule spike;
  int64_t max_consecutive_skips = 5;
  CheckpointOptions checkpoint;
  ProgressOptions progress;
  // What must not change between a run and its continuation beside what the loop knows itself (data, options, parameter shapes,
  // frozen weights, version): model and statistics hashes, method constants, seed. Differences are shown entry by entry.
  std::map<std::string, std::string> fingerprint;
};

struct StepStats {
  int64_t step = 0;      // 1..steps
  double loss = 0;       // CE per unmasked label
  double aux = 0;        // mean of the micro-batches, not scaled by aux_coef
  double entropy = 0;    // likewise, 0 where entropy_coef is
  double open = 0;       // likewise, 0 where sparsity_coef is
  double grad_norm = 0;  // before clipping
  double lr = 0;
  int64_t tokens = 0, labels = 0;
  double seconds = 0;
  uint64_t epoch = 0;
  std::string
      skipped;  // "" or why the update was not applied: "loss nan", "gradient norm inf", "loss spike", "no labels"
};
struct EvalPoint {
  double loss = 0;                        // smaller is better: decides `best`
  std::map<std::string, double> metrics;  // for the log
};

// Everything a caller may add. All optional; called on the calling thread.
struct TrainerHooks {
  std::function<void(int64_t step)> before_step;     // before the forward pass of step 1..steps
  std::function<void(const StepStats&)> after_step;  // after the update
  std::function<EvalPoint(int64_t step)> evaluate;   // may poll stop_requested()
  std::function<void(const std::filesystem::path&)>
      save_model;                                    // writes a loadable model into a checkpoint being prepared
  std::function<Json()> save_extra;                  // state of the hooks themselves, into state.json
  std::function<void(const Json&)> load_extra;       // on resume, after weights and moments, before before_step
  std::function<Json(const StepStats&)> log_fields;  // an object merged into the step's log line (beta, ...)
};

struct TrainResult {
  int64_t steps_done = 0;  // of the whole run, resumed part included
  int64_t first_step = 1;  // > 1 when resumed
  int64_t skipped = 0;
  double loss = 0;  // of the last applied step
  std::optional<double> eval_loss, best_eval_loss;
  int64_t best_step = 0;
  int64_t tokens = 0;  // trained on in this process
  double seconds = 0;
  int stopped_by_signal = 0;  // 0 = ran to the end
};
// 0, or 128 + signal (75 when `requeue`).
int exit_code_of(const TrainResult& result, bool requeue);

// Errors: kUsage (options), kResume (nothing good to resume from, or another run's), kNumeric (k skips in a row; names the last
// good checkpoint), kIo (a save failed; earlier checkpoints are intact). Gradients are released at the end.
TrainResult train(TrainableModel& model, DataStream& data, const TrainerOptions& options,
                  const TrainerHooks& hooks = {});

// True once a stop signal has come while train() runs: long hooks may return early.
bool stop_requested();

}  // namespace lightmoe
