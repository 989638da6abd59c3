#pragma once
// A comparison as a TOML file: one model, several tasks, methods, ratios and seeds (recipes/*.toml are examples; compress/recipe.cpp
// is the list of keys). Relative paths are relative to the working directory. An optional [short] table replaces some of it.
// `methods` are recovered after compression, those of `train_free` are (also) evaluated as compressed.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "compress/annealing.h"
#include "compress/calibrate.h"
#include "compress/registry.h"
#include "model/trainer.h"

namespace lightmoe {

struct RecipeTraining {
  int64_t steps = 100, rows = 32, length = 128, accumulate = 1;
  bool pack = false;
  double lr = 1e-4;  // arXiv 2603.12645: AdamW, batch 32, 1e-4
  std::string schedule = "cosine", warmup = "0.03";
  double min_lr_ratio = 0, weight_decay = 0, clip = 1, aux_coef = 0, entropy_coef = 0;
  double beta1 = 0.9, beta2 = 0.95;
  int64_t save_every = 0, eval_every = 0;
  Recompute recompute = Recompute::kNone;
  std::optional<double> anneal;
  std::string anneal_shape = "linear";
  double anneal_gamma = 3;
  double distill = 0, distill_temperature = 1;
  bool router_kd = false;
  std::string extend;  // an extension that trains instead, as a text
  bool merge = true;
};

struct RecipeTask {
  std::string name, title, scenario;  // scenario: a heading in the report ("preserving", "adapting")
  std::string train, validation, test;
  std::string metric = "auto";
  double steps_scale = 1, lr_scale = 1;
};

struct RecipeMethod {
  std::string name;    // in the report; [method.NAME] may set the rest
  std::string method;  // in the registry
  std::string note;    // stands under the report's tables
  MethodOptions options;
  RecipeTraining training;
  std::vector<double> ratios;  // empty: the method takes no budget
  bool recover = true;         // false: evaluated as compressed, no training
};

// Whether runs of it train: the method has something to train and is to be recovered.
bool trains(const RecipeMethod& method);

struct Recipe {
  std::string file, title, model, output;
  std::vector<int64_t> seeds = {1};
  std::vector<RecipeMethod> methods;
  std::vector<RecipeTask> tasks;
  CalibrateOptions calibrate;
  int64_t eval_batch = 32, eval_limit = 0, eval_max_new_tokens = 0;
  DType save_dtype = DType::kF32;  // of recovered models; "source" in the file is the model's own
  bool save_source_dtype = true;
  bool measure_speed = true;
  bool keep_models =
      true;  // false: a recovered model goes once it is evaluated, but for the one whose speed is measured
};

// short_form: apply [short]. Error(kUsage) with file, line, key and the nearest known key.
Recipe read_recipe(const std::string& file, bool short_form);

}  // namespace lightmoe
