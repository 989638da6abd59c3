#pragma once
// The stages of one recipe (compress/runner.h), each skipped when its key and output are there already.

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "compress/runner.h"
#include "loaders/tokenizer.h"
#include "model/olmoe.h"

namespace lightmoe {

// One task's files, read once.
struct TaskData {
  std::string name;
  std::vector<Document> train, validation;
  std::vector<TextRecord> test;                // text
  std::vector<std::vector<int32_t>> test_ids;  // or rows of ids
  std::string train_hash, validation_hash, test_hash;
};

class Stages {
 public:
  Stages(const Recipe& recipe, const RunnerOptions& options);

  void calibrate(size_t task);
  // False when a signal stopped training; exit_code() then.
  bool run(const RunPlan& plan, const std::string& position);
  int exit_code() const { return stopped_by_; }
  // Whether the speed of this run's model is its row's: of the first task and seed.
  bool stands_for_its_row(const RunPlan& plan) const {
    return plan.task == 0 && (plan.seed == 0 || plan.seed == recipe_.seeds.front());
  }
  // Its speed, if its model is there and not measured yet.
  void measure(const RunPlan& plan);

 private:
  using Path = std::filesystem::path;
  // What each stage's output depends on; `model`: what is evaluated.
  struct Keys {
    std::string compressed, model, result;
  };
  const TaskData& data(size_t task);
  Path task_directory(size_t task) const { return Path(recipe_.output) / recipe_.tasks[task].name; }
  Path run_directory(const RunPlan& plan) const { return Path(recipe_.output) / plan.directory; }
  // Shared by the seeds, and by the tasks where none of their data is read.
  Path compressed_directory(const RunPlan& plan) const;
  Path model_directory(const RunPlan& plan) const;  // what is evaluated
  std::string statistics_key(size_t task);
  bool needs(bool (*what)(const Method&, const MethodOptions&)) const;  // whether some method of the recipe does
  Keys keys_of(const RunPlan& plan);
  void compress(const RunPlan& plan, const std::string& key);
  bool recover(const RunPlan& plan, const std::string& key);  // false when stopped
  bool train_back(const RunPlan& plan, const RecipeTraining& training);
  void fill_training(const RunPlan& plan, RunResult& result) const;
  void fill_evaluation(const RunPlan& plan, RunResult& result);
  RecipeTraining training_of(const RunPlan& plan) const;
  TrainerOptions trainer_options(const RecipeTraining& training, const Path& directory) const;
  DType source_dtype() const { return config_.torch_dtype == "float32" ? DType::kF32 : DType::kBF16; }
  DType saved_dtype() const { return recipe_.save_source_dtype ? source_dtype() : recipe_.save_dtype; }
  void say(const std::string& line) const {
    if (options_.say) options_.say(line);
  }

  const Recipe& recipe_;
  const RunnerOptions& options_;
  OlmoeConfig config_;
  std::string fingerprint_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Olmoe> original_;  // for calibration, loaded once
  TaskData data_;
  int stopped_by_ = 0;
};

}  // namespace lightmoe
