// The page around the charts: one file, no network, no script.

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "compress/report_charts.h"
#include "compress/report_pareto.h"
#include "compress/svg.h"
#include "compress/text.h"

namespace lightmoe {
namespace {

constexpr const char* kStyle = R"css(
:root { color-scheme: light dark; --paper:#fdfdfb; --ink:#1d2329; --soft:#5d6872; --line:#dfe3e6; --card:#ffffff; --heat:#0b4f8a;
  --m0:#3b434b; --m1:#d1500a; --m2:#3f9bd8; --m3:#00875f; --m4:#e39400; --m5:#1f5fa8; --m6:#8a4fbf; --m7:#b8558f; --m8:#7a6a00; }
@media (prefers-color-scheme: dark) {
  :root { --paper:#14181c; --ink:#e7ebee; --soft:#9aa6b0; --line:#2c343b; --card:#1a2026; --heat:#63b3f2;
    --m0:#c3ccd4; --m1:#ff8a4a; --m2:#7cc4f5; --m3:#3fc79a; --m4:#f7bd4b; --m5:#7aa9ea; --m6:#bb92ea; --m7:#e08fbd; --m8:#cdbb4a; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1120px; margin:0 auto; padding:40px 28px 80px; }
h1 { font-size:30px; line-height:1.2; margin:0 0 6px; letter-spacing:-.01em; }
h2 { font-size:21px; margin:52px 0 6px; letter-spacing:-.005em; }
h3 { font-size:15px; margin:0 0 6px; }
p { margin:6px 0 14px; max-width:78ch; }
.soft { color:var(--soft); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(215px,1fr)); gap:14px; margin:26px 0 8px; }
.tile { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px; }
.tile b { display:block; font-size:25px; line-height:1.25; font-weight:650; font-variant-numeric:tabular-nums; }
.tile span { color:var(--soft); font-size:14px; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; font-variant-numeric:tabular-nums; font-size:14.5px; min-width:100%; }
th, td { text-align:right; padding:6px 12px; border-bottom:1px solid var(--line); white-space:nowrap; }
th { color:var(--soft); font-weight:600; vertical-align:bottom; }
th:nth-child(1), td:nth-child(1), th:nth-child(2), td:nth-child(2) { text-align:left; }
tr.first td { border-top:2px solid var(--soft); }
td.best { font-weight:700; }
.dot { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:8px; }
.grid3 { display:grid; grid-template-columns:repeat(auto-fit,minmax(320px,1fr)); gap:18px; }
.grid2 { display:grid; grid-template-columns:repeat(auto-fit,minmax(460px,1fr)); gap:18px; }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px 8px; overflow-x:auto; }
svg { max-width:100%; height:auto; display:block; }
svg text { font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif; fill:var(--ink); }
svg .axis { fill:var(--soft); font-variant-numeric:tabular-nums; }
svg .name { fill:var(--soft); font-weight:600; }
svg .note { fill:var(--soft); font-size:11.5px; }
svg .grid { stroke:var(--line); stroke-width:1; }
svg .base { stroke:var(--soft); stroke-width:1; }
svg .mark { stroke:var(--soft); stroke-width:1; stroke-dasharray:3 3; }
svg .halo { stroke:var(--card); stroke-width:1.2; }
svg .paper { fill:var(--card); }
svg .cell { fill:var(--heat); }
svg .front { stroke:var(--soft); stroke-width:1.4; stroke-dasharray:5 3; }
svg .lead { stroke:var(--soft); stroke-width:.7; }
svg .label { font-size:11.5px; }
.wide { width:min(1560px,96vw); margin-left:calc(50% - min(780px,48vw)); display:grid; grid-template-columns:minmax(0,1.25fr) minmax(0,1fr); gap:18px; align-items:start; }
.matrix { font-size:12.5px; } .matrix th, .matrix td { padding:2px 7px; }
.matrix th:nth-child(2), .matrix td:nth-child(2) { text-align:right; }
@media (max-width:1180px) { .wide { grid-template-columns:1fr; } }
.legend { display:flex; flex-wrap:wrap; gap:4px 18px; margin:6px 0 12px; font-size:14px; }
.legend span { display:inline-flex; align-items:center; gap:5px; }
.legend svg { width:18px; height:14px; }
pre { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px; overflow-x:auto; font-size:13px; line-height:1.45; }
summary { cursor:pointer; color:var(--soft); }
@media (max-width:560px) { .grid2, .grid3 { grid-template-columns:1fr; } main { padding:24px 14px 60px; } }
@media print { main { max-width:none; } .card, .tile { break-inside:avoid; } }
)css";

// The row of a method at a ratio, trained if there is such a one; null when there is none.
const ReportRow* find_row(const Report& report, const std::string& method, double ratio) {
  const ReportRow* found = nullptr;
  for (const ReportRow& row : report.rows) {
    if (row.method == method && row.ratio == ratio && (found == nullptr || row.recovered)) found = &row;
  }
  return found;
}

double largest_ratio(const Report& report) {
  double ratio = 0;
  for (const ReportRow& row : report.rows) ratio = std::max(ratio, row.ratio);
  return ratio;
}

// The method whose selection the heat maps show: the featured one, or the first that takes a budget.
std::string shown_method(const Report& report) {
  std::string first;
  for (const ReportRow& row : report.rows) {
    if (row.ratio == 0) continue;
    if (row.method == report.featured) return row.method;
    if (first.empty()) first = row.method;
  }
  return first;
}

std::string tile(const std::string& value, const std::string& text) {
  return fmt::format("<div class=\"tile\"><b>{}</b><span>{}</span></div>\n", value, escape_markup(text));
}

std::string tiles(const Report& report) {
  const double ratio = largest_ratio(report);
  const std::string method = shown_method(report);
  const ReportRow *row = find_row(report, method, ratio), *adapters = find_row(report, report.whole_with_adapters, 0),
                  *original = find_row(report, report.original, 0);
  if (row == nullptr) return "";
  std::string html = "<div class=\"tiles\">\n";
  const double saved = 1 - row->file_bytes / report.original_bytes;
  html += tile(fmt::format("{:.0f} % smaller", 100 * saved),
               fmt::format("{} → {} of weights at {} removed, on disk and in memory",
                           human_bytes(static_cast<int64_t>(report.original_bytes)),
                           human_bytes(static_cast<int64_t>(row->file_bytes)), ratio_text(ratio)));
  if (row->average)
    html += tile(fmt::format("{:.1f} %", 100 * row->average->mean),
                 fmt::format("average score of {} at {} removed", method, ratio_text(ratio)));
  if (adapters != nullptr && adapters->average)
    html += tile(fmt::format("{:.1f} %", 100 * adapters->average->mean),
                 fmt::format("average score of {} on the whole model, as many trainable parameters", adapters->method));
  if (original != nullptr && original->average)
    html += tile(fmt::format("{:.1f} %", 100 * original->average->mean),
                 "average score of the model as it is, not trained on the tasks");
  if (row->decode > 0 && original != nullptr && original->decode > 0) {
    html += tile(fmt::format("{:.0f} / {:.0f}", row->decode, original->decode),
                 fmt::format("tokens/s in generation on this machine, {} at {} / original", method, ratio_text(ratio)));
  }
  return html + "</div>\n";
}

// The best mean of each task, and of the average last, among the rows of one ratio.
std::vector<double> best_means(const Report& report, double ratio) {
  std::vector<double> best(report.tasks.size() + 1, std::nan(""));
  const auto take = [](double& to, double value, bool higher) {
    if (std::isnan(to) || (higher ? value > to : value < to)) to = value;
  };
  for (const ReportRow& row : report.rows) {
    if (row.ratio != ratio) continue;
    for (size_t t = 0; t < report.tasks.size(); ++t) {
      if (row.cells[t].seeds > 0) take(best[t], row.cells[t].mean, report.tasks[t].higher_is_better);
    }
    if (row.average) take(best.back(), row.average->mean, true);
  }
  return best;
}

// Removed share and method; a heavier line above the first row of each ratio.
std::string row_head(const Report& report, const ReportRow& row, double last_ratio) {
  return fmt::format("<tr{}><td>{}</td><td><span class=\"dot\" style=\"background:{}\"></span>{}</td>",
                     row.ratio != last_ratio ? " class=\"first\"" : "", ratio_text(row.ratio),
                     is_crowded(report) ? family_color(report, row.method) : method_color(report, row.method),
                     escape_markup(row.label()));
}

std::string quality_table(const Report& report) {
  std::string html = "<div class=\"scroll\"><table>\n<tr><th>removed</th><th>method</th>";
  for (const ReportTask& task : report.tasks) html += fmt::format("<th>{}</th>", escape_markup(task.title));
  html += "<th>average</th><th>weights</th></tr>\n";
  double last = -1;
  for (const ReportRow& row : report.rows) {
    const std::vector<double> best = best_means(report, row.ratio);
    html += row_head(report, row, last);
    last = row.ratio;
    for (size_t t = 0; t < row.cells.size(); ++t) {
      html += fmt::format("<td{}>{}</td>", row.cells[t].mean == best[t] ? " class=\"best\"" : "",
                          cell_text(&report.tasks[t], row.cells[t]));
    }
    const bool is_best = row.average && row.average->mean == best.back();
    html += fmt::format("<td{}>{}</td>", is_best ? " class=\"best\"" : "",
                        row.average ? cell_text(nullptr, *row.average) : "-");
    html += fmt::format("<td>{}</td></tr>\n", human_bytes(static_cast<int64_t>(row.file_bytes)));
  }
  return html + "</table></div>\n";
}

std::string cost_table(const Report& report) {
  std::string html =
      "<h2>Cost</h2>\n<p class=\"soft\">Parameters and bytes of what is stored; in memory as measured from the live "
      "weights when loaded in the stored type; "
      "trained parameters, the most tensor memory during training, steps, tokens and seconds of one run and its speed "
      "(means over tasks and seeds); prefill and decode as loaded here, "
      "the best of three.</p>\n"
      "<div class=\"scroll\"><table>\n<tr><th>removed</th><th>method</th><th>parameters</th><th>on disk</th><th>in "
      "memory</th><th>trained</th>"
      "<th>training<br>memory</th><th>steps</th><th>tokens</th><th>seconds</th><th>training<br>tokens/s</th>"
      "<th>prefill<br>tokens/s</th><th>decode<br>tokens/s</th></tr>\n";
  double last = -1;
  const auto count = [](double value) {
    return value > 0 ? human_count(static_cast<int64_t>(value)) : std::string("-");
  };
  const auto bytes = [](double value) {
    return value > 0 ? human_bytes(static_cast<int64_t>(value)) : std::string("-");
  };
  const auto speed = [](double value) { return value > 0 ? fmt::format("{:.0f}", value) : std::string("-"); };
  for (const ReportRow& row : report.rows) {
    html += row_head(report, row, last);
    last = row.ratio;
    html += fmt::format("<td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>", count(row.parameters),
                        bytes(row.file_bytes), bytes(row.live_bytes), count(row.trainable), bytes(row.peak_bytes));
    html +=
        fmt::format("<td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\n", speed(row.steps),
                    speed(row.trained_tokens), row.train_seconds > 0 ? fmt::format("{:.1f}", row.train_seconds) : "-",
                    speed(row.train_speed), speed(row.prefill), speed(row.decode));
  }
  return html + "</table></div>\n";
}

std::string quality_section(const Report& report) {
  std::string html =
      "<h2>Quality against size</h2>\n<p class=\"soft\">Every point is a model on the held-out test split; "
      "lines join the ratios of one "
      "method, whiskers are the standard deviation over seeds, dotted levels belong to references that keep the whole "
      "model.</p>\n";
  html += legend(report, row_labels(report));
  const std::string all = quality_chart(report, nullptr, 1040, 380);
  if (!all.empty()) html += "<div class=\"card\"><h3>Average of all tasks</h3>" + all + "</div><br>\n";
  html += "<div class=\"grid3\">\n";
  for (const ReportTask& task : report.tasks) {
    const std::string scenario =
        task.scenario.empty() ? "" : fmt::format(" <span class=\"soft\">· {}</span>", escape_markup(task.scenario));
    html += fmt::format("<div class=\"card\"><h3>{}{}</h3>{}</div>\n", escape_markup(task.title), scenario,
                        quality_chart(report, &task, 340, 250));
  }
  return html + "</div>\n";
}

std::string heat_section(const Report& report) {
  const std::string method = shown_method(report);
  std::string maps;
  for (const ReportTask& task : report.tasks) {
    const std::string map = gate_heat_map(report, task, method);
    if (!map.empty())
      maps += fmt::format("<div class=\"card\"><h3>{}</h3>{}</div><br>\n", escape_markup(task.title), map);
  }
  if (maps.empty()) return "";
  return fmt::format(
             "<h2>Which experts a task uses</h2>\n<p class=\"soft\">One row per layer, one cell per expert, darker "
             "where more of the layer's gate mass goes (white: none; "
             "darkest: four times an even share and more). A filled dot marks experts that {} replaces at the smallest "
             "ratio already, a ring those it replaces only at a larger "
             "one; the numbers at the right count them.</p>\n",
             escape_markup(method)) +
         maps;
}

std::string training_section(const Report& report) {
  const double ratio = largest_ratio(report);
  std::string charts;
  for (const ReportTask& task : report.tasks) {
    const std::string chart = training_chart(report, task, ratio, 510, 320);
    if (!chart.empty())
      charts += fmt::format("<div class=\"card\"><h3>{}</h3>{}</div>\n", escape_markup(task.title), chart);
  }
  if (charts.empty()) return "";
  return fmt::format(
             "<h2>Training, {} removed</h2>\n<p class=\"soft\">Loss on the training batches (sliding mean, "
             "logarithmic), first seed. β is the share of the original "
             "experts in an annealed run: 1 at the first step, which is the original model, and 0 from the dashed line "
             "on, where they leave memory.</p>\n",
             ratio_text(ratio)) +
         legend(report, report.method_order) + "<div class=\"grid2\">\n" + charts + "</div>\n";
}

}  // namespace

std::string to_html(const Report& report) {
  std::string html = fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" "
      "content=\"width=device-width, initial-scale=1\">\n<title>{}</title>\n<style>{}</style>\n</head>\n<body><main>\n",
      escape_markup(report.title), kStyle);
  html += fmt::format(
      "<h1>{}</h1>\n<p class=\"soft\">{}: {} parameters, {} layers of {} experts, {} of weights. Made by "
      "<code>lightmoe run {}</code>, {}.</p>\n",
      escape_markup(report.title), escape_markup(report.model), human_count(report.original_parameters),
      report.num_layers, report.num_slots, human_bytes(static_cast<int64_t>(report.original_bytes)),
      escape_markup(report.recipe_file), escape_markup(versions_text(report)));
  html += tiles(report);
  html += pareto_section(report);
  std::string measures;
  for (const ReportTask& task : report.tasks) {
    measures += fmt::format("{}{}: {}{} over {} records", measures.empty() ? "" : "; ", task.title, task.metric,
                            task.share ? " in %" : "", task.test_records);
  }
  html += fmt::format(
      "<h2>Results</h2>\n<p class=\"soft\">On the held-out test split, after training on the task unless the row says "
      "otherwise. {}. ± is the standard deviation over seeds, bold the best of its ratio.{}</p>\n",
      escape_markup(measures),
      report.missing > 0 ? fmt::format(" {} of the recipe's {} runs have no result here.", report.missing,
                                       report.missing + static_cast<int64_t>(report.runs.size()))
                         : std::string());
  html += quality_table(report);
  for (const std::string& note : report.notes) html += "<p class=\"soft\">" + escape_markup(note) + "</p>\n";
  html += is_crowded(report) ? "" : quality_section(report) + heat_section(report) + training_section(report);
  html += cost_table(report);
  html += fmt::format("<h2>The recipe</h2>\n<details><summary>{}</summary><pre>{}</pre></details>\n",
                      escape_markup(report.recipe_file), escape_markup(report.recipe_text));
  return html + "</main></body></html>\n";
}

}  // namespace lightmoe
