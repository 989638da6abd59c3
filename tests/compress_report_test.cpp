// The report's numbers from runs made up here, and the drawing underneath it.

#include "compress/report.h"

#include <gtest/gtest.h>

#include "compress/report_charts.h"
#include "compress/report_pareto.h"
#include "compress/svg.h"
#include "loaders/json.h"

namespace lightmoe {
namespace {

RunResult run(const std::string& task, const std::string& method, double ratio, int64_t seed, double score,
              double bytes) {
  RunResult r{.task = task, .method = method, .ratio = ratio, .recovered = ratio > 0, .seed = seed};
  r.main_metric = "exact_match";
  r.metrics["exact_match"] = {score, .01, true};
  r.metrics["loss"] = {1 - score, std::nullopt, false};
  r.file_bytes = static_cast<int64_t>(bytes);
  r.parameters = r.file_bytes / 2;
  r.replaced = {{0, 2}, {1}};
  r.curve = {{1, 2.0, 1.0, 900}, {2, 1.5, .5, 900}, {3, 1.0, 0, 400}};
  return r;
}

// Two tasks, two methods, two seeds for the compressed one. Built by hand: make_report needs a model on disk.
Report small_report() {
  Report report{
      .title = "A & B <test>", .model = "m", .version = "v", .recipe_file = "r.toml", .recipe_text = "x = \"<y>\""};
  report.original_parameters = 5000, report.original_bytes = 10000, report.num_layers = 2, report.num_slots = 4;
  report.method_order = {"original", "lightmoe"};
  report.original = "original", report.featured = "lightmoe";
  for (const char* name : {"math", "code"}) {
    report.tasks.push_back({.name = name, .title = name, .metric = "exact_match", .share = true, .test_records = 10});
    report.tasks.back().gate_scores = {{.1, .4, .2, .3}, {.25, .25, .25, .25}};
    report.runs.push_back(run(name, "original", 0, 0, .9, 10000));
    report.runs.push_back(run(name, "lightmoe", .5, 1, .8, 5000));
    report.runs.push_back(run(name, "lightmoe", .5, 2, .7, 5200));
  }
  report.rows = report_rows(report, {{"original", 0, false}, {"lightmoe", .5, true}});
  return report;
}

TEST(Report, AveragesOverSeedsAndTasks) {
  const Report report = small_report();
  ASSERT_EQ(report.rows.size(), 2u);
  const ReportRow& row = report.rows[1];
  EXPECT_NEAR(row.cells[0].mean, .75, 1e-12);
  EXPECT_NEAR(*row.cells[0].deviation, std::sqrt(.005), 1e-12);  // of .8 and .7, n - 1
  EXPECT_NEAR(*row.cells[0].loss, .25, 1e-12);
  EXPECT_NEAR(row.average->mean, .75, 1e-12);
  EXPECT_EQ(row.file_bytes, 5100);
  EXPECT_FALSE(report.rows[0].cells[0].deviation.has_value());
  EXPECT_EQ(cell_text(&report.tasks[0], row.cells[0]), "75.0 ± 7.1");
}

TEST(Report, NotesStandUnderTheTables) {
  Report report = small_report();
  report.notes = {"lightmoe: a <remark>"};
  EXPECT_NE(to_markdown(report).find("\nlightmoe: a <remark>\n"), std::string::npos);
  EXPECT_NE(to_html(report).find("lightmoe: a &lt;remark&gt;"), std::string::npos);
}

TEST(Report, NamesTheVersionsThatComputedIt) {
  Report report = small_report();
  for (RunResult& r : report.runs) r.versions = {"v"};
  EXPECT_EQ(versions_text(report), "computed and written by v");
  report.version = "later";
  EXPECT_EQ(versions_text(report), "computed by v; written by later");
  report.runs[1].versions = {"u", "v"};  // trained by u, evaluated by v
  report.runs[2].versions = {};          // a result of a time when none was kept
  EXPECT_EQ(versions_text(report), "computed by an unknown version (1 run), u (1 run), v (5 runs); written by later");
  EXPECT_NE(to_markdown(report).find("u (1 run)"), std::string::npos);
  EXPECT_NE(to_html(report).find("u (1 run)"), std::string::npos);
  EXPECT_EQ(to_json(report)["runs"][1]["versions"], Json({"u", "v"}));
}

TEST(Report, MarkdownHasARowForEveryMethodAndRatio) {
  const std::string text = to_markdown(small_report());
  EXPECT_NE(text.find("| - | original | 90.0 | 90.0 | 90.0 | 5.0 k | 0.01 MiB | 0.00 MiB | - | - | - | - | - | - |"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("| 50 % | lightmoe | 75.0 ± 7.1 | 75.0 ± 7.1 | 75.0 ± 7.1 |"), std::string::npos) << text;
}

TEST(Report, JsonRoundTripsTheRuns) {
  const Json json = parse_json(to_json(small_report()).dump(), "json");
  EXPECT_EQ(json["rows"].size(), 2u);
  EXPECT_NEAR(json["runs"][1]["train_loss"]["first_5_steps"].get<double>(), 1.5, 1e-12);  // three steps in all
  EXPECT_NEAR(json["runs"][1]["train_loss"]["last_eighth"].get<double>(), 1, 1e-12);
  EXPECT_NEAR(json["rows"][1]["tasks"]["math"]["mean"].get<double>(), .75, 1e-12);
  const RunResult original = run("math", "lightmoe", .5, 1, .8, 5000);
  const RunResult again = result_from_json(parse_json(to_json(original).dump(), "json"), "r");
  EXPECT_EQ(to_json(again).dump(), to_json(original).dump());
  EXPECT_THROW(result_from_json(Json{{"task", 3}}, "r"), Error);
}

// Sizes 10, 20, 30, 30: of the untrained, 20 is beaten by the smaller 10 and the first 30 by the second; trained ones are apart.
TEST(Report, ParetoFrontHoldsWhatNothingSmallerBeats) {
  Report report = small_report();
  report.runs.clear();
  const auto add = [&](const std::string& method, double bytes, double score, bool recovered) {
    for (const char* task : {"math", "code"}) {
      report.runs.push_back(run(task, method, .5, recovered ? 1 : 0, score, bytes));
      report.runs.back().recovered = recovered;
    }
    report.method_order.push_back(method);
    report.families[method] = "removed experts";
  };
  add("a", 10, .5, false);
  add("b", 20, .4, false);
  add("c", 30, .5, false);
  add("d", 30, .6, false);
  add("e", 5, .1, true);
  std::vector<RowKey> keys;
  for (const char* name : {"a", "b", "c", "d"}) keys.push_back({name, .5, false});
  keys.push_back({"e", .5, true});
  report.rows = report_rows(report, keys);
  EXPECT_EQ(pareto_front(report, false), (std::vector<size_t>{0, 3}));
  EXPECT_EQ(pareto_front(report, true), (std::vector<size_t>{4}));
  EXPECT_EQ(report.rows[0].label(), "a, no training");
  EXPECT_EQ(report.rows[4].label(), "e");
  const std::string section = pareto_section(report);
  EXPECT_EQ(section.find("nan"), std::string::npos);
  EXPECT_NE(section.find(">d</text>"), std::string::npos);  // named in the picture
  EXPECT_NE(section.find("<td class=\"best\">60.0</td>"), std::string::npos) << section;
  EXPECT_NE(to_html(report).find("All methods"), std::string::npos);
}

// A recipe may call its methods anything: colours and markers go by what they are, and no two of the others' pairs are equal.
TEST(Report, PartsKeepTheirLooksUnderAnyName) {
  Report report = small_report();
  report.method_order = {"a", "b", "c", "d", "e", "f", "g"};
  report.original = "b", report.whole_with_adapters = "d", report.featured = "f";
  EXPECT_EQ(method_color(report, "b"), "var(--m0)");
  EXPECT_EQ(method_color(report, "d"), "var(--m3)");
  EXPECT_EQ(method_color(report, "f"), "var(--m1)");
  EXPECT_EQ(method_color(report, "f, no training"), "var(--m1)");
  const std::vector<std::string> others = {"a", "c", "e", "g"};
  for (size_t i = 0; i < others.size(); ++i) {
    for (size_t j = 0; j < i; ++j) EXPECT_NE(method_color(report, others[i]), method_color(report, others[j]));
  }
  report.families = {{"a", "removed experts"}, {"b", kWholeModel}, {"f", "expert replacing"}};
  EXPECT_EQ(family_color(report, "b"), "var(--m0)");
  EXPECT_EQ(family_color(report, "f"), "var(--m1)");
  EXPECT_EQ(family_color(report, "a"), "var(--m2)");
}

TEST(Report, SaysHowManyRunsAreMissing) {
  Report report = small_report();
  EXPECT_EQ(to_markdown(report).find("have no result"), std::string::npos);
  report.missing = 4;
  EXPECT_NE(to_markdown(report).find("4 of the recipe's 10 runs have no result here."), std::string::npos);
  EXPECT_NE(to_html(report).find("4 of the recipe's 10 runs"), std::string::npos);
  EXPECT_EQ(to_json(report)["missing_runs"], 4);
}

int count(const std::string& text, const std::string& piece) {
  int n = 0;
  for (size_t at = text.find(piece); at != std::string::npos; at = text.find(piece, at + 1)) ++n;
  return n;
}

TEST(Report, PageStandsAlone) {
  const std::string html = to_html(small_report());
  EXPECT_NE(html.find("<title>A &amp; B &lt;test&gt;</title>"), std::string::npos);
  EXPECT_EQ(html.find("<script"), std::string::npos);
  EXPECT_EQ(count(html, "http"), count(html, "http://www.w3.org/2000/svg"));  // no network
  EXPECT_EQ(html.find("url("), std::string::npos);
  EXPECT_EQ(html.find("src="), std::string::npos);
  EXPECT_EQ(count(html, "<svg"), count(html, "</svg>"));
  EXPECT_NE(html.find("x = &quot;&lt;y&gt;&quot;"), std::string::npos);
  EXPECT_EQ(html.find("nan"), std::string::npos);
}

TEST(Report, HeatMapMarksReplacedSlots) {
  const Report report = small_report();
  const std::string svg = gate_heat_map(report, report.tasks[0], "lightmoe");
  EXPECT_EQ(count(svg, "class=\"cell\""), 8);
  EXPECT_EQ(count(svg, "<circle"), 3);  // slots 0 and 2 of layer 0, 1 of layer 1
  EXPECT_NE(svg.find("layer 0, expert 1: 40.00 % of the gate mass<"), std::string::npos);
  EXPECT_NE(svg.find("layer 0, expert 2: 20.00 % of the gate mass, replaced at 50 %"), std::string::npos);
  EXPECT_NE(svg.find("2 replaced"), std::string::npos);
}

TEST(Report, ChartsSurviveOddNumbers) {
  Report report = small_report();
  for (RunResult& r : report.runs) {
    r.metrics["exact_match"].value = 0;
    for (TrainedStep& s : r.curve) s.loss = 0;
  }
  report.rows = report_rows(report, {{"original", 0, false}, {"lightmoe", .5, true}});
  const std::string html = to_html(report);
  EXPECT_EQ(html.find("nan"), std::string::npos);
  EXPECT_EQ(html.find("inf"), std::string::npos);
  report.runs.clear();
  report.rows = report_rows(report, {{"original", 0, false}, {"lightmoe", .5, true}});
  EXPECT_EQ(to_html(report).find("nan"), std::string::npos);
}

TEST(Svg, Ticks) {
  EXPECT_EQ(nice_ticks(0, 10, 5), (std::vector<double>{0, 2, 4, 6, 8, 10}));
  EXPECT_EQ(nice_ticks(39.2, 42.9, 4), (std::vector<double>{40, 41, 42}));
  EXPECT_EQ(nice_ticks(3, 3, 4), (std::vector<double>{3}));
  EXPECT_EQ(tick_text(0.30000000000000004, .1), "0.3");
  EXPECT_EQ(tick_text(-0.0, .5), "0");
  EXPECT_EQ(tick_text(1200, 100), "1200");
  const std::vector<double> ticks = log_ticks(.08, 3);
  ASSERT_EQ(ticks.size(), 5u);  // .1 .2 .5 1 2
  EXPECT_NEAR(ticks[1], .2, 1e-12);
  const SvgScale scale{.low = 1, .high = 100, .from = 0, .to = 10, .logarithmic = true};
  EXPECT_NEAR(scale(10), 5, 1e-12);
}

TEST(Svg, EscapesAndNests) {
  Svg svg(10, 10, "a<b");
  svg.rect(1, 2, 3.456, 4, "class=\"x\"");
  svg.tooltip("\"q\" & more");
  svg.text(0, 0, "<&>", "start");
  const std::string text = svg.str();
  EXPECT_NE(text.find("<title>a&lt;b</title>"), std::string::npos);
  EXPECT_NE(text.find("<rect x=\"1\" y=\"2\" width=\"3.46\" height=\"4\" class=\"x\"><title>&quot;q&quot; &amp; "
                      "more</title></rect>"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("&lt;&amp;&gt;</text>"), std::string::npos);
}

}  // namespace
}  // namespace lightmoe
