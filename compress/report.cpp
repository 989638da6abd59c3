#include "compress/report.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "compress/registry.h"
#include "compress/runner.h"
#include "compress/selection.h"
#include "compress/text.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "loaders/safetensors.h"
#include "model/config.h"
#include "runtime/version.h"

namespace lightmoe {
namespace {

bool is_share(const std::string& metric) { return metric == "exact_match" || metric.rfind("acc", 0) == 0; }

double mean_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

ReportCell cell_of(const std::vector<double>& values) {
  ReportCell cell{.mean = mean_of(values), .seeds = static_cast<int64_t>(values.size()), .values = values};
  if (values.size() > 1) {
    double squares = 0;
    for (const double v : values) squares += (v - cell.mean) * (v - cell.mean);
    cell.deviation = std::sqrt(squares / static_cast<double>(values.size() - 1));
  }
  return cell;
}

ReportTask task_of(const Recipe& recipe, const RecipeTask& task, const std::vector<RunResult>& results) {
  ReportTask out{.name = task.name, .title = task.title, .scenario = task.scenario};
  for (const RunResult& run : results) {
    if (run.task != task.name) continue;
    out.metric = run.main_metric;
    out.share = is_share(run.main_metric);
    const auto found = run.metrics.find(run.main_metric);
    if (found != run.metrics.end()) out.higher_is_better = found->second.higher_is_better;
    out.test_records = run.test_records;
    break;
  }
  const std::filesystem::path file = std::filesystem::path(recipe.output) / task.name / "statistics.safetensors";
  if (std::filesystem::exists(file)) {
    for (const LayerStatistics& layer : load_statistics(file).layers) out.gate_scores.push_back(gate_scores(layer));
  }
  return out;
}

// All runs of one method at one ratio.
ReportRow row_of(const Report& report, const RowKey& key) {
  ReportRow row{key};
  std::vector<double> parameters, files, live, trainable, peak, prefill, decode, speed, steps, tokens, seconds;
  std::map<int64_t, std::vector<double>> by_seed;  // quality of each task
  for (const ReportTask& task : report.tasks) {
    std::vector<double> quality, loss;
    for (const RunResult& run : report.runs) {
      if (run.task != task.name || run.method != key.method || run.ratio != key.ratio || run.recovered != key.recovered)
        continue;
      quality.push_back(run.quality());
      by_seed[run.seed].push_back(run.quality());
      if (const auto found = run.metrics.find("loss"); found != run.metrics.end()) loss.push_back(found->second.value);
      parameters.push_back(static_cast<double>(run.parameters));
      files.push_back(static_cast<double>(run.file_bytes));
      live.push_back(static_cast<double>(run.live_bytes));
      trainable.push_back(static_cast<double>(run.trainable));
      peak.push_back(static_cast<double>(run.peak_bytes));
      if (run.prefill_tokens_per_second > 0) prefill.push_back(run.prefill_tokens_per_second);
      if (run.decode_tokens_per_second > 0) decode.push_back(run.decode_tokens_per_second);
      steps.push_back(static_cast<double>(run.steps));
      tokens.push_back(static_cast<double>(run.trained_tokens));
      seconds.push_back(run.train_seconds);
      if (run.train_seconds > 0) speed.push_back(static_cast<double>(run.trained_tokens) / run.train_seconds);
    }
    row.cells.push_back(cell_of(quality));
    if (!loss.empty()) row.cells.back().loss = mean_of(loss);
  }
  row.parameters = mean_of(parameters), row.file_bytes = mean_of(files), row.live_bytes = mean_of(live);
  row.trainable = mean_of(trainable), row.peak_bytes = mean_of(peak);
  row.prefill = mean_of(prefill), row.decode = mean_of(decode), row.train_speed = mean_of(speed);
  row.steps = mean_of(steps), row.trained_tokens = mean_of(tokens), row.train_seconds = mean_of(seconds);
  if (std::all_of(report.tasks.begin(), report.tasks.end(), [](const ReportTask& t) { return t.share; })) {
    std::vector<double> averages;
    for (const auto& [seed, values] : by_seed) {
      if (values.size() == report.tasks.size()) averages.push_back(mean_of(values));
    }
    if (!averages.empty()) row.average = cell_of(averages);
  }
  return row;
}

// What the replaced slots become, in the words that colour the charts. The featured method's paper is a family of its own.
std::string family_of(const Method& method, const Method& featured) {
  const auto has = [&](const char* kind) { return method.slots.find(kind) != std::string::npos; };
  if (!method.compresses) return kWholeModel;
  if (has("shared") && method.paper == featured.paper) return "expert replacing";
  if (has("adapter")) return "base + low rank";
  if (has("latent")) return "shared factors";
  if (has("constant")) return "constants";
  if (has("shared")) return "shared experts";
  if (has("removed")) return "removed experts";
  return method.slots.empty() ? "other" : method.slots;
}

// A recipe's method for each part of its own: the first that fits.
void name_parts(Report& report, const std::string& name, const Method& method) {
  const auto take = [&](std::string& part, bool fits) {
    if (fits && part.empty()) part = name;
  };
  take(report.featured, method.featured);
  take(report.original, !method.compresses && method.trainable == Trainable::kNothing);
  take(report.whole_with_adapters, !method.compresses && method.trainable == Trainable::kAdapters);
}

double mean_loss(const std::vector<TrainedStep>& curve, size_t begin, size_t end) {
  std::vector<double> losses;
  for (size_t i = begin; i < std::min(end, curve.size()); ++i) losses.push_back(curve[i].loss);
  return mean_of(losses);
}
// The highest mean of `window` steps in a row: how bad training got on its way.
double highest_loss(const std::vector<TrainedStep>& curve, size_t window) {
  double highest = mean_loss(curve, 0, window);
  for (size_t i = 1; i + window <= curve.size(); ++i) highest = std::max(highest, mean_loss(curve, i, i + window));
  return highest;
}
Json number_or_null(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

std::string number(double value) { return std::isfinite(value) ? fmt::format("{:.4g}", value) : "-"; }

}  // namespace

std::string ratio_text(double ratio) { return ratio > 0 ? fmt::format("{:g} %", std::round(1000 * ratio) / 10) : "-"; }

std::string cell_text(const ReportTask* task, const ReportCell& cell) {
  if (cell.seeds == 0 || !std::isfinite(cell.mean)) return "-";
  const bool share = task == nullptr || task->share;
  if (!share) return number(cell.mean);
  std::string text = fmt::format("{:.1f}", 100 * cell.mean);
  if (cell.deviation) text += fmt::format(" ± {:.1f}", 100 * *cell.deviation);
  return text;
}

std::string versions_text(const Report& report) {
  std::map<std::string, int64_t> runs;
  for (const RunResult& run : report.runs) {
    for (const std::string& version : run.versions) ++runs[version];
    if (run.versions.empty()) ++runs["an unknown version"];
  }
  if (runs.size() == 1 && runs.begin()->first == report.version) return "computed and written by " + report.version;
  std::string text;
  for (const auto& [version, count] : runs) {
    text += (text.empty() ? "computed by " : ", ") + version;
    if (runs.size() > 1) text += fmt::format(" ({} run{})", count, count == 1 ? "" : "s");
  }
  return text + (text.empty() ? "" : "; ") + "written by " + report.version;
}

std::vector<ReportRow> report_rows(const Report& report, const std::vector<RowKey>& keys) {
  std::vector<ReportRow> rows;
  for (const RowKey& key : keys) rows.push_back(row_of(report, key));
  return rows;
}

Report make_report(const Recipe& recipe, std::vector<RunResult> results) {
  const OlmoeConfig config = read_config(recipe.model);
  const ModelSize size = model_size(config);
  Report report{.title = recipe.title.empty() ? "LightMoE comparison" : recipe.title,
                .model = recipe.model,
                .version = version(),
                .recipe_file = recipe.file,
                .recipe_text = read_file(recipe.file, int64_t{1} << 20),
                .original_parameters = size.total(),
                .num_layers = size.layers,
                .num_slots = size.slots,
                .original_bytes = static_cast<double>(Checkpoint(recipe.model).total_bytes())};
  for (const RecipeTask& task : recipe.tasks) report.tasks.push_back(task_of(recipe, task, results));
  report.missing = static_cast<int64_t>(list_runs(recipe).size() - results.size());
  report.runs = std::move(results);
  const auto featured = std::find_if(methods().begin(), methods().end(), [](const Method& m) { return m.featured; });
  std::vector<RowKey> keys;
  for (const RecipeMethod& method : recipe.methods) {
    if (report.method_order.empty() || report.method_order.back() != method.name) {  // its rows follow each other
      report.method_order.push_back(method.name);
      report.families[method.name] = family_of(find_method(method.method), *featured);
      name_parts(report, method.name, find_method(method.method));
      if (!method.note.empty()) report.notes.push_back(method.name + ": " + method.note);
    }
    for (const double ratio : method.ratios.empty() ? std::vector<double>{0} : method.ratios)
      keys.push_back({method.name, ratio, trains(method)});
  }
  std::stable_sort(keys.begin(), keys.end(), [](const RowKey& a, const RowKey& b) { return a.ratio < b.ratio; });
  report.rows = report_rows(report, keys);
  std::erase_if(report.rows, [](const ReportRow& row) {
    return std::all_of(row.cells.begin(), row.cells.end(), [](const ReportCell& cell) { return cell.seeds == 0; });
  });
  return report;
}

std::string to_markdown(const Report& report) {
  std::string text =
      fmt::format("# {}\n\nModel {}, {} parameters, {}. ", report.title, report.model,
                  human_count(report.original_parameters), human_bytes(static_cast<int64_t>(report.original_bytes)));
  std::string names;
  for (const ReportTask& task : report.tasks) {
    names += fmt::format("{}{} ({}{}, {} test records)", names.empty() ? "" : ", ", task.title, task.metric,
                         task.share ? " %" : "", task.test_records);
  }
  text += "Tasks: " + names + ". ± is the standard deviation over seeds. Made by `lightmoe run " + report.recipe_file +
          "` (" + versions_text(report) + ").";
  if (report.missing > 0) {
    text += fmt::format(" {} of the recipe's {} runs have no result here.", report.missing,
                        report.missing + static_cast<int64_t>(report.runs.size()));
  }
  text += "\n\n| removed | method |";
  for (const ReportTask& task : report.tasks) text += fmt::format(" {} |", task.title);
  text +=
      " average | parameters | stored | live | prefill tok/s | decode tok/s | trained | steps | tokens | seconds "
      "|\n|---|---|";
  for (size_t i = 0; i < report.tasks.size() + 10; ++i) text += "---:|";
  text += "\n";
  for (const ReportRow& row : report.rows) {
    text += fmt::format("| {} | {} |", ratio_text(row.ratio), row.label());
    for (size_t t = 0; t < row.cells.size(); ++t)
      text += fmt::format(" {} |", cell_text(&report.tasks[t], row.cells[t]));
    text += fmt::format(" {} |", row.average ? cell_text(nullptr, *row.average) : "-");
    text += fmt::format(" {} | {} | {} |", human_count(static_cast<int64_t>(row.parameters)),
                        human_bytes(static_cast<int64_t>(row.file_bytes)),
                        human_bytes(static_cast<int64_t>(row.live_bytes)));
    text += row.decode > 0 ? fmt::format(" {:.0f} | {:.0f} |", row.prefill, row.decode) : std::string(" - | - |");
    text += row.recovered
                ? fmt::format(" {} | {:.0f} | {:.0f} | {:.1f} |\n", human_count(static_cast<int64_t>(row.trainable)),
                              row.steps, row.trained_tokens, row.train_seconds)
                : std::string(" - | - | - | - |\n");
  }
  text +=
      "\nSizes are of the weights, stored and in memory. Trained parameters, steps, tokens and seconds are of one run, "
      "means over tasks and "
      "seeds; rows without training have no random part.\n";
  for (const std::string& note : report.notes) text += "\n" + note + "\n";
  return text;
}

Json to_json(const Report& report) {
  const auto cell_json = [](const ReportCell& cell) {
    return Json{{"mean", std::isfinite(cell.mean) && cell.seeds > 0 ? Json(cell.mean) : Json(nullptr)},
                {"deviation", cell.deviation ? Json(*cell.deviation) : Json(nullptr)},
                {"loss", cell.loss && std::isfinite(*cell.loss) ? Json(*cell.loss) : Json(nullptr)},
                {"seeds", cell.seeds},
                {"values", cell.values}};
  };
  Json tasks = Json::array(), rows = Json::array(), runs = Json::array();
  for (const ReportTask& task : report.tasks) {
    tasks.push_back({{"name", task.name},
                     {"title", task.title},
                     {"scenario", task.scenario},
                     {"metric", task.metric},
                     {"test_records", task.test_records}});
  }
  for (const ReportRow& row : report.rows) {
    Json cells = Json::object();
    for (size_t t = 0; t < row.cells.size(); ++t) cells[report.tasks[t].name] = cell_json(row.cells[t]);
    rows.push_back({{"method", row.method},
                    {"ratio", row.ratio},
                    {"recovered", row.recovered},
                    {"tasks", cells},
                    {"average", row.average ? cell_json(*row.average) : Json(nullptr)},
                    {"parameters", row.parameters},
                    {"file_bytes", row.file_bytes},
                    {"live_bytes", row.live_bytes},
                    {"trainable", row.trainable},
                    {"training_peak_bytes", row.peak_bytes},
                    {"prefill_tokens_per_second", row.prefill},
                    {"decode_tokens_per_second", row.decode},
                    {"train_tokens_per_second", row.train_speed},
                    {"steps", row.steps},
                    {"trained_tokens", row.trained_tokens},
                    {"train_seconds", row.train_seconds}});
  }
  for (const RunResult& run : report.runs) {
    if (is_crowded(report)) break;  // rows have the values of all seeds; the rest is in the runs' own files
    Json json = to_json(run);
    json.erase("curve");  // stands in the run's own result.json
    if (!run.curve.empty()) {
      const size_t n = run.curve.size();
      json["train_loss"] = {{"first_5_steps", number_or_null(mean_loss(run.curve, 0, 5))},
                            {"highest_5_steps", number_or_null(highest_loss(run.curve, 5))},
                            {"last_eighth", number_or_null(mean_loss(run.curve, n - (n + 7) / 8, n))}};
    }
    runs.push_back(std::move(json));
  }
  return {{"title", report.title},
          {"written_by", report.version},
          {"computed_by", versions_text(report)},
          {"missing_runs", report.missing},
          {"model", report.model},
          {"recipe", report.recipe_file},
          {"original_parameters", report.original_parameters},
          {"original_bytes", report.original_bytes},
          {"tasks", tasks},
          {"rows", rows},
          {"runs", runs}};
}

void write_report(const Report& report, const std::filesystem::path& directory) {
  write_file_atomically(directory / "report.json", to_json(report).dump(1) + "\n");
  write_file_atomically(directory / "report.md", to_markdown(report));
  write_file_atomically(directory / "report.html", to_html(report));
}

}  // namespace lightmoe
