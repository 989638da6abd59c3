#pragma once
// recover: a compressed directory is trained back. What happens around the training loop (model/trainer.h):
//   before   adapters on every slot that has none (A as compress/adapter.h draws it, B zero); what the method trains is
//            trainable, the rest frozen; trainable weights are f32, frozen ones as asked
//   steps    while beta > 0 replaced slots run as beta W_original + (1-beta) W_base + B A, minus beta B0 A0 where the adapters do not
//            start at zero (svd), so that the first step is exactly the original model; at beta = 0 the originals leave memory
//            methods that choose experts or units while training (compress/task_pruning.h, unit_pruning.h) drop them on the way
//            where the bases' members were aligned, an original fades with its hidden units in the base's order: the same function
//   distill  while the originals are in memory they, with the frozen rest, are the original model: its output is the teacher of
//            autograd/distillation.h. Not in the paper.
//   extend   an extension (model/moe_extension.h) on every block trains instead of adapters and bases
//   routers  instead of all that: nothing anneals, the routers alone train, the whole original is the teacher (compress/router_kd.h)
//   after    adapters of slots that own their expert are merged into it (W += B A) and removed, unless told otherwise
// Everything is a function of the step and of the two directories, so a resumed run continues bit for bit; what a pruner has seen and
// the clock of an adaptive annealing are kept in the checkpoints.

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "compress/annealing.h"
#include "compress/record.h"
#include "compress/task_pruning.h"
#include "compress/unit_pruning.h"
#include "model/trainer.h"
#include "model/training_estimate.h"

namespace lightmoe {

struct RecoveryOptions {
  std::optional<Annealing> annealing;  // absent: the method's
  double distill = 0;                  // weight of the original model's output in the loss while it is in memory
  double distill_temperature = 1;
  std::optional<uint64_t> seed;  // draws adapters that start without effect; absent: what compression drew
  bool merge = true;
  bool train_routers = false;  // beside what the method trains
  bool router_kd = false;  // routers alone, towards the original's output at distill_temperature (compress/router_kd.h)
  std::optional<ExtensionShape> extend;  // trains alone, on every block
  DType dtype = DType::kF32;             // of frozen weights in memory
  std::function<void(const std::string&)> say;
};

class Originals;  // compress/originals.h

class Recovery {
 public:
  // base: the original model. Error(kInput) when it is not the one that was compressed. steps: of the whole run.
  Recovery(const std::filesystem::path& compressed, const std::filesystem::path& base, int64_t steps,
           const RecoveryOptions& options);
  ~Recovery();

  Olmoe& model() { return *model_; }
  // What the training loop runs.
  TrainableModel& trainable() { return trainable_; }
  const CompressionRecord& record() const { return record_; }
  const Annealing& annealing() const { return annealing_; }
  // before_step, log_fields and save_model; `evaluate` is the caller's. dtype: of models inside checkpoints.
  TrainerHooks hooks(DType saved_dtype);
  // What identifies the run beside the trainer's own fingerprint.
  std::map<std::string, std::string> fingerprint() const;
  // After training: beta 0, adapters merged. Once.
  void finish();
  // Into a directory being prepared: config, tensors, tokenizer files, compression.json with `result`.
  void save(const std::filesystem::path& directory, DType dtype, const Json& result) const;

  // KL(original || model) per label of the last training pass, 0 without a teacher.
  double teacher_kl() const { return kl_; }
  // Bytes the originals take at this moment.
  int64_t original_bytes() const;

 private:
  // Training passes with what recovery adds to them.
  class Observed : public TrainableModel {
   public:
    explicit Observed(Recovery& recovery) : recovery_(recovery) {}
    std::vector<ParameterPtr> parameters() const override { return recovery_.model_->parameters(); }
    TrainLosses forward_backward(const Batch& batch, const TrainOptions& options) override;

   private:
    Recovery& recovery_;
  };
  void check_distillation() const;
  bool adds_adapters() const { return !options_.router_kd && !options_.extend; }
  Json state() const;
  void restore(const Json& state);
  void set_beta(double beta);
  void redraw_adapters(uint64_t seed);
  void add_adapters();
  void choose_trainable();

  std::filesystem::path compressed_;
  RecoveryOptions options_;
  CompressionRecord record_;
  Annealing annealing_;
  std::unique_ptr<Olmoe> model_;
  AnnealingClock clock_{annealing_, 0};
  double beta_ = 0;                          // of the step at hand
  std::unique_ptr<Originals> originals_;     // null from beta = 0 on
  std::unique_ptr<TaskPruner> pruner_;       // of methods that choose experts while training
  std::unique_ptr<UnitPruner> unit_pruner_;  // of those that choose units
  std::unique_ptr<Olmoe> teacher_;           // with distillation: made of the originals, while they are there; or whole
  double kl_ = 0;
  bool finished_ = false;
  Observed trainable_{*this};
};

// Before anything is loaded: parameters, bytes, memory while annealing and after.
struct RecoveryEstimate {
  TrainingEstimate training;
  int64_t original_bytes = 0;                       // while annealing
  int64_t teacher_bytes = 0;                        // the whole original, of router_kd
  int64_t stored_parameters = 0, stored_bytes = 0;  // of what will be written
};
RecoveryEstimate estimate_recovery(const std::filesystem::path& compressed, const RecoveryOptions& options,
                                   DType saved_dtype, int64_t tokens_per_pass, Recompute recompute,
                                   GemmCompute compute = GemmCompute::kF32);

}  // namespace lightmoe
