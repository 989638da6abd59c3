#include "compress/run_result.h"

#include <cmath>

#include "loaders/json.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }
Json number(const std::optional<double>& value) { return value ? number(*value) : Json(nullptr); }
double value_of(const Json& json) { return json.is_number() ? json.get<double>() : std::nan(""); }
std::optional<double> optional_of(const Json& json) {
  if (!json.is_number()) return std::nullopt;
  return json.get<double>();
}

}  // namespace

double RunResult::quality() const {
  const auto found = metrics.find(main_metric);
  return found == metrics.end() ? std::nan("") : found->second.value;
}

Json to_json(const RunResult& r) {
  Json metrics = Json::object(), curve = Json::array();
  for (const auto& [name, m] : r.metrics) {
    metrics[name] = {
        {"value", number(m.value)}, {"stderr", number(m.std_error)}, {"higher_is_better", m.higher_is_better}};
  }
  for (const TrainedStep& s : r.curve) curve.push_back(Json::array({s.step, number(s.loss), s.beta, s.live_bytes}));
  return {{"task", r.task},
          {"method", r.method},
          {"ratio", r.ratio},
          {"recovered", r.recovered},
          {"seed", r.seed},
          {"key", r.key},
          {"versions", r.versions},
          {"parameters", r.parameters},
          {"original_parameters", r.original_parameters},
          {"trainable", r.trainable},
          {"rank", r.rank},
          {"file_bytes", r.file_bytes},
          {"live_bytes", r.live_bytes},
          {"main_metric", r.main_metric},
          {"metrics", metrics},
          {"test_records", r.test_records},
          {"validation_loss", number(r.validation_loss)},
          {"steps", r.steps},
          {"trained_tokens", r.trained_tokens},
          {"train_seconds", r.train_seconds},
          {"peak_bytes", r.peak_bytes},
          {"replaced", r.replaced},
          {"curve", curve}};
}

RunResult result_from_json(const Json& json, const std::string& name) {
  RunResult r;
  try {
    r.task = json.at("task").get<std::string>();
    r.method = json.at("method").get<std::string>();
    r.ratio = json.at("ratio").get<double>();
    r.seed = json.at("seed").get<int64_t>();
    r.recovered = json.value("recovered", json.at("steps").get<int64_t>() > 0);  // older results do not say
    r.key = json.at("key").get<std::string>();
    r.versions = json.value("versions", std::vector<std::string>{});  // older results have none
    r.parameters = json.at("parameters").get<int64_t>();
    r.original_parameters = json.at("original_parameters").get<int64_t>();
    r.trainable = json.at("trainable").get<int64_t>();
    r.rank = json.at("rank").get<int64_t>();
    r.file_bytes = json.at("file_bytes").get<int64_t>();
    r.live_bytes = json.at("live_bytes").get<int64_t>();
    r.main_metric = json.at("main_metric").get<std::string>();
    for (const auto& [key, m] : json.at("metrics").items()) {
      r.metrics[key] = {value_of(m.at("value")), optional_of(m.at("stderr")), m.at("higher_is_better").get<bool>()};
    }
    r.test_records = json.at("test_records").get<int64_t>();
    r.validation_loss = optional_of(json.at("validation_loss"));
    r.steps = json.at("steps").get<int64_t>();
    r.trained_tokens = json.at("trained_tokens").get<int64_t>();
    r.train_seconds = json.at("train_seconds").get<double>();
    r.peak_bytes = json.at("peak_bytes").get<int64_t>();
    r.replaced = json.at("replaced").get<std::vector<std::vector<int32_t>>>();
    for (const Json& s : json.at("curve")) {
      r.curve.push_back({s.at(0).get<int64_t>(), value_of(s.at(1)), s.at(2).get<double>(), s.at(3).get<int64_t>()});
    }
  } catch (const Json::exception& error) {
    fail(ErrorKind::kInput, "{}: not a result of this version ({})", name, error.what());
  }
  return r;
}

}  // namespace lightmoe
