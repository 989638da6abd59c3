#pragma once
// Options of the verbs that run the training loop (train, recover), and what is made of them.

#include <filesystem>
#include <string>
#include <vector>

#include "cli/flags.h"
#include "loaders/dataset.h"
#include "loaders/tokenizer.h"
#include "model/config.h"
#include "model/trainer.h"

namespace lightmoe::cli {

struct TrainingFlags {
  std::vector<std::string> data, tokens, eval_data;
  DataStream::Options stream;
  bool no_pack = false, no_shuffle = false, skip_invalid = false;
  TrainerOptions trainer;
  std::string compute = "f32", schedule = "cosine", warmup = "0.03", recompute = "none";
  std::vector<double> betas = {0.9, 0.95};
  bool decay_all = false;
  double aux_coef = -1;
  std::string out, checkpoint_directory, log, save_dtype = "source";
  int64_t eval_batch = 32;
  bool force = false, dry_run = false, requeue = false, no_checkpoint_model = false;
};
void add_training_flags(Flags& app, TrainingFlags& flags);

// Everything that can be said without a model. default_aux_coef: where --aux-coef is not given.
TrainerOptions trainer_options(const TrainingFlags& flags, const OlmoeConfig& config, double default_aux_coef);
DataStream open_data(const TrainingFlags& flags, const OlmoeConfig& config, const Tokenizer* tokenizer);
std::vector<Document> open_eval_data(const TrainingFlags& flags, const OlmoeConfig& config, const Tokenizer* tokenizer);
DType saved_dtype(const TrainingFlags& flags, const OlmoeConfig& config);
// Its last line on standard output: "OUT: 100 steps, loss 0.1234, ..."
void print_training_summary(const TrainingFlags& flags, const TrainResult& result);

}  // namespace lightmoe::cli
