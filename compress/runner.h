#pragma once
// run RECIPE.toml: calibrate, compress, recover and evaluate every (task, method, ratio, seed) of a recipe, then report.
//   OUTPUT/TASK/statistics.safetensors
//   OUTPUT/TASK/METHOD[-rRR]-sSEED/{compressed/, model/, train.log.jsonl, result.json}
//   OUTPUT/report.{json,md,html}
// Every stage has a key: the hash of its settings, its inputs and the keys of the stages before it. A stage whose output is complete
// and whose key is the same is skipped; a training run that was stopped continues from its checkpoint.

#include <functional>
#include <string>
#include <vector>

#include "compress/recipe.h"
#include "compress/run_result.h"

namespace lightmoe {

struct RunnerOptions {
  int64_t worker = 0, workers = 1;  // runs i with i % workers == worker are this process's
  std::function<void(const std::string&)> say;
};

struct RunPlan {  // one run, named
  size_t task = 0, method = 0;
  double ratio = 0;
  int64_t seed = 0;
  std::string directory;  // relative to the recipe's output: "math/lightmoe-r50-s1"
};
std::vector<RunPlan> list_runs(const Recipe& recipe);

// Files that are missing, budgets that cannot be met: before any work. One line per run with what it will take.
std::string describe(const Recipe& recipe);

// Statistics of all tasks that need them.
void run_calibration(const Recipe& recipe, const RunnerOptions& options);
// The runs of this worker. False when a signal stopped it (everything so far is kept); the exit code goes to *stopped_by.
bool run_stages(const Recipe& recipe, const RunnerOptions& options, int* stopped_by);
// All results, in the order of list_runs. Error(kInput) when one is missing.
std::vector<RunResult> load_results(const Recipe& recipe);

}  // namespace lightmoe
