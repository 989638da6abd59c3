#pragma once
// What one run of a recipe (task, method, ratio, seed) came to: everything the report needs, as result.json keeps it.

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "loaders/json_type.h"

namespace lightmoe {

struct RunMetric {
  double value = 0;
  std::optional<double> std_error;
  bool higher_is_better = false;
};

struct TrainedStep {
  int64_t step = 0;
  double loss = 0, beta = 0;
  int64_t live_bytes = 0;
};

struct RunResult {
  std::string task, method;  // names in the recipe
  double ratio = 0;          // asked for; 0 = none
  bool recovered = false;    // trained on the task
  int64_t seed = 0;
  std::string key;  // of everything the result depends on
  // Of the program, in the stages it came from (compress, train, evaluate), each once; a resumed recipe may have had several.
  std::vector<std::string> versions;
  // size
  int64_t parameters = 0, original_parameters = 0, trainable = 0, rank = 0;
  int64_t file_bytes = 0;  // of the tensors on disk
  int64_t live_bytes = 0;  // of the weights, measured when loaded as stored
  // quality on the test split; main is the task's own measure
  std::string main_metric;
  std::map<std::string, RunMetric> metrics;
  int64_t test_records = 0;
  std::optional<double> validation_loss;
  // training
  int64_t steps = 0, trained_tokens = 0;
  double train_seconds = 0;
  int64_t peak_bytes = 0;  // most live tensor memory during training
  std::vector<TrainedStep> curve;
  // speed as loaded, best of a few; 0 = not measured. Stands in speed.json, one run of a row is measured.
  double prefill_tokens_per_second = 0, decode_tokens_per_second = 0;
  std::vector<std::vector<int32_t>> replaced;  // per layer, slots

  double quality() const;  // the main metric
};

Json to_json(const RunResult& result);
// Error(kInput) starting with `name`.
RunResult result_from_json(const Json& json, const std::string& name);

}  // namespace lightmoe
