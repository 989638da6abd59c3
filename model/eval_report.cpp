#include <algorithm>
#include <cmath>

#include "loaders/json.h"
#include "model/eval.h"

namespace lightmoe {
namespace {

Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

}  // namespace

const MetricValue* EvalResult::find(std::string_view name) const {
  const auto at = std::find_if(metrics.begin(), metrics.end(), [&](const MetricValue& m) { return m.name == name; });
  return at == metrics.end() ? nullptr : &*at;
}

double EvalResult::value(std::string_view name) const {
  const MetricValue* metric = find(name);
  require(metric != nullptr, "evaluation has no metric {}", name);
  return metric->value;
}

Json to_json(const EvalResult& result) {
  Json json = {{"metric", name_of(result.metric)},      {"records", result.records},
               {"scored_tokens", result.scored_tokens}, {"forward_tokens", result.forward_tokens},
               {"truncated", result.truncated},         {"seconds", number(result.seconds)}};
  Json& metrics = json["metrics"] = Json::object();
  for (const MetricValue& m : result.metrics) {
    metrics[m.name] = {{"value", number(m.value)},
                       {"stderr", m.std_error ? number(*m.std_error) : Json(nullptr)},
                       {"higher_is_better", m.higher_is_better}};
  }
  if (result.samples.empty()) return json;
  Json& samples = json["samples"] = Json::array();
  for (const EvalSample& s : result.samples) {
    samples.push_back({{"line", s.line}, {"output", s.output}, {"expected", s.expected}, {"correct", s.correct}});
  }
  return json;
}

std::string to_table(const std::string& task, const EvalResult& result) {
  std::string table = fmt::format("{:<24} {:<18} {:>12} {:>10} {:>7}\n", "task", "metric", "value", "+-stderr", "n");
  for (const MetricValue& m : result.metrics) {
    table += fmt::format("{:<24} {:<18} {:>12} {:>10} {:>7}\n", task, m.name, fmt::format("{:.6g}", m.value),
                         m.std_error ? fmt::format("{:.2g}", *m.std_error) : "-", result.records);
  }
  if (result.truncated > 0)
    table +=
        fmt::format("{}: {} sequences longer than the context, their oldest tokens dropped\n", task, result.truncated);
  return table;
}

}  // namespace lightmoe
