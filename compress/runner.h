#pragma once
// run RECIPE.toml: calibrate, compress, recover and evaluate every (task, method, ratio, seed) of a recipe, then report.
//   OUTPUT/TASK/statistics.safetensors
//   OUTPUT/TASK/METHOD[-rRR]/compressed/     what all seeds start from; under every.task/ where the task does not matter
//   OUTPUT/TASK/METHOD[-rRR]-free/result.json                        evaluated as compressed
//   OUTPUT/TASK/METHOD[-rRR]-sSEED/{model/, train.log.jsonl, result.json}
//   OUTPUT/TASK/.../speed.json               of one run per method and ratio, measured at the end with nothing beside it
//   OUTPUT/report.{json,md,html}
// Every stage has a key: the hash of its settings, its inputs and the keys of the stages before it. A run whose result has the key is
// skipped, and so is a stage whose output is complete and has it; a training run that was stopped continues from its checkpoint.
// A compression does not depend on the seed: the methods' own draws take [compress] seed, recovery's adapters the run's.

#include <functional>
#include <string>
#include <vector>

#include "compress/recipe.h"
#include "compress/run_result.h"

namespace lightmoe {

struct RunnerOptions {
  int64_t worker = 0, workers = 1;  // runs i with i % workers == worker are this process's
  std::string only;                 // regular expression: runs whose directory has a match; empty = all
  std::function<void(const std::string&)> say;
};

struct RunPlan {  // one run, named
  size_t task = 0, method = 0;
  double ratio = 0;
  int64_t seed = 0;
  std::string directory;  // relative to the recipe's output: "math/lightmoe-r50-s1"
};
std::vector<RunPlan> list_runs(const Recipe& recipe);
// Those of them that `only` names, in the same order. Error(kUsage): no regular expression, or none matches.
std::vector<RunPlan> chosen_runs(const Recipe& recipe, const std::string& only);

// Files that are missing, budgets that cannot be met: before any work. One line per run with what it will take.
std::string describe(const Recipe& recipe);

// Statistics of all tasks that need them.
void run_calibration(const Recipe& recipe, const RunnerOptions& options);
// The runs of this worker. False when a signal stopped it (everything so far is kept); the exit code goes to *stopped_by.
bool run_stages(const Recipe& recipe, const RunnerOptions& options, int* stopped_by);
// Speed of the first run of each row whose model is there, one after the other.
void measure_speeds(const Recipe& recipe, const RunnerOptions& options);
// All results, in the order of list_runs. Error(kInput) when one is missing, unless `partly`: then those that are there.
std::vector<RunResult> load_results(const Recipe& recipe, bool partly = false);

}  // namespace lightmoe
