#pragma once
// Step checkpoints of a training run. A directory DIR/step-00000100 appears complete or not at all (loaders/output.h) and holds
//   state.json             counters, data position, loss window, fingerprint, extra state of the hooks
//   optimizer.safetensors  per trainable parameter: weight.NAME in its memory type, exp_avg.NAME, exp_avg_sq.NAME, for bf16 master.NAME
//   whatever save_model wrote: the same weights as a loadable model directory
// Restoring reads the first two only, in place, so it is exact whatever the model is and however it was rounded for its own files;
// frozen weights come from the caller, and the fingerprint vouches for them.

#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "autograd/optimizer.h"
#include "loaders/dataset.h"
#include "loaders/json.h"
#include "model/trainer.h"

namespace lightmoe {

using Fingerprint = std::map<std::string, std::string>;

struct TrainingState {
  int64_t step = 0;     // steps done
  int64_t updates = 0;  // of those, applied
  int64_t skipped = 0, consecutive_skips = 0;
  int64_t evaluated_step = 0;  // of the last evaluation, 0 = none
  std::optional<double> eval_loss, best_eval_loss;
  int64_t best_step = 0;
  double loss = 0;  // of the last applied step
  DataStream::Position data;
  std::deque<double> losses, norms;  // the spike rule's windows
  Fingerprint fingerprint;
  Json extra;
};
std::string state_to_json(const TrainingState& state);
// Untrusted text: every field is checked. Error(kInput) starting with `name`.
TrainingState parse_state(const std::string& json, const std::string& name);

// Everything the continuation must share with the run: see trainer.h. Hashes the frozen weights.
Fingerprint make_fingerprint(const std::vector<ParameterPtr>& parameters, const std::string& data,
                             const TrainerOptions& options);
// "lr: 0.001, now 0.002; data: 1f.., now 9c..", or "" when equal.
std::string fingerprint_difference(const Fingerprint& then, const Fingerprint& now);

// The step directories of one run. While it lives it holds DIR/.lock: a second process in the same directory is refused.
class CheckpointStore {
 public:
  struct Found {
    std::filesystem::path directory;
    TrainingState state;
  };
  using Warn = std::function<void(const std::string&)>;

  // Creates the directory (not its parents) and removes what a killed process left; the destructor removes
  // it again when nothing was saved. Does nothing when options.directory is empty.
  CheckpointStore(const CheckpointOptions& options, Warn warn);
  ~CheckpointStore();
  CheckpointStore(const CheckpointStore&) = delete;
  CheckpointStore& operator=(const CheckpointStore&) = delete;

  bool enabled() const { return !options_.directory.empty(); }
  // What options.resume asks for: newest complete checkpoint whose hashes hold and whose state parses; worse ones are passed over
  // with a warning. Empty: start anew ("auto" finds no checkpoint at all, or resume is ""). Error(kResume) when there are only bad
  // ones, or when the fingerprint differs (unless resume_anyway, then a warning).
  std::optional<Found> find(const Fingerprint& now) const;
  // Into weights and moments. Later checkpoints in the directory belong to an abandoned continuation or are corrupt: they are
  // renamed to step-N.abandoned, so that no later resume picks them.
  void restore(const Found& found, Optimizer& optimizer);
  void start_anew();  // renames all of them; with overwrite the first save removes them

  // No-op if this step is saved already. Old checkpoints go only after the new one is in place.
  void save(const TrainingState& state, Optimizer& optimizer,
            const std::function<void(const std::filesystem::path&)>& save_model);
  std::filesystem::path last_good() const { return last_good_; }  // empty: none yet

 private:
  void set_aside_from(int64_t step) const;
  void prune(const TrainingState& state) const;
  CheckpointOptions options_;
  Warn warn_;
  std::filesystem::path last_good_;
  int64_t last_saved_step_ = -1;
  int lock_ = -1;
};

}  // namespace lightmoe
