#pragma once
// What a recipe's runs come to: rows averaged over seeds, a Markdown table, report.json and one self-contained report.html.

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "compress/recipe.h"
#include "compress/run_result.h"
#include "compress/statistics.h"

namespace lightmoe {

struct ReportCell {  // one method at one ratio on one task
  double mean = 0;
  std::optional<double> deviation;  // standard deviation over seeds, two at least
  std::optional<double> loss;       // of the test split
  int64_t seeds = 0;
  std::vector<double> values;  // in the order of the seeds
};

struct RowKey {
  std::string method;
  double ratio = 0;        // 0: takes no budget
  bool recovered = false;  // trained on the task after compression, or instead of it
};

struct ReportRow : RowKey {
  std::vector<ReportCell> cells;      // one per task
  std::optional<ReportCell> average;  // of the tasks, per seed; where all are shares
  // Means over tasks and seeds.
  double parameters = 0, file_bytes = 0, live_bytes = 0, trainable = 0, peak_bytes = 0;
  double prefill = 0, decode = 0, train_speed = 0;  // tokens/s
  // What one run trained.
  double steps = 0, trained_tokens = 0, train_seconds = 0;
  // "reap", "reap, no training"
  std::string label() const { return ratio > 0 && !recovered ? method + ", no training" : method; }
};

struct ReportTask {
  std::string name, title, scenario, metric;
  bool share = false;  // the metric is a share from 0 to 1, shown in per cent
  bool higher_is_better = true;
  int64_t test_records = 0;
  std::vector<std::vector<double>> gate_scores;  // per layer and slot, of the calibration; empty: not calibrated
};

struct Report {
  std::string title, model;
  std::string version;  // that writes the report; what it reports may come from others
  std::string recipe_file, recipe_text;
  int64_t original_parameters = 0, num_layers = 0, num_slots = 0;
  double original_bytes = 0;
  std::vector<ReportTask> tasks;
  std::vector<ReportRow> rows;  // by ratio, then as in the recipe
  std::vector<RunResult> runs;
  int64_t missing = 0;  // runs of the recipe that have no result
  std::vector<std::string> method_order;
  std::map<std::string, std::string> families;  // of each method: what its slots become
  // Methods with a part of their own in tables and pictures, "" where the recipe has none such: the model as it is, adapters on the whole
  // model, and the featured one (Method::featured).
  std::string original, whole_with_adapters, featured;
  std::vector<std::string> notes;  // "method: what the recipe says about it"
};

inline constexpr const char* kWholeModel = "whole model";  // the family of what takes no budget

// One row per key, averaged over report.runs.
std::vector<ReportRow> report_rows(const Report& report, const std::vector<RowKey>& keys);
// More methods than curves and a legend can tell apart.
inline bool is_crowded(const Report& report) { return report.method_order.size() > 12; }
// results in the order of list_runs; rows without any are left out.
Report make_report(const Recipe& recipe, std::vector<RunResult> results);
std::string to_markdown(const Report& report);
Json to_json(const Report& report);
std::string to_html(const Report& report);
// report.json, report.md, report.html
void write_report(const Report& report, const std::filesystem::path& directory);

// "97.5", "97.5 ± 0.4", "0.0123": a cell as people read it.
std::string cell_text(const ReportTask* task, const ReportCell& cell);
std::string ratio_text(double ratio);  // "50 %", "-"
// Which versions of the program made the results, and which wrote the report: "computed and written by 1a2b3c4",
// "computed by 1a2b3c4 (12 runs), 5d6e7f8 (3 runs); written by 5d6e7f8".
std::string versions_text(const Report& report);

}  // namespace lightmoe
