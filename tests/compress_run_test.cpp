// Recipes: keys, nearest match, and a run of two methods on a golden model that is skipped where it is done.

#include <gtest/gtest.h>
#include <signal.h>

#include <sstream>

#include "compress/registry.h"
#include "compress/report.h"
#include "compress/runner.h"
#include "compress/weights.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "runtime/version.h"
#include "tests/support/files.h"
#include "tests/support/program.h"

namespace lightmoe {
namespace {

namespace fs = std::filesystem;
using testing::fails_with;
using testing::get_file;
using testing::ProgramResult;
using testing::put_file;
using testing::run_lightmoe;
using testing::TempDir;

std::string recipe_text(const fs::path& output, const std::string& extra = "", const std::string& train = "steps = 2") {
  return "[recipe]\nmodel = \"tests/golden/e64k8\"\noutput = \"" + output.string() +
         "\"\nmethods = [\"original\", \"lora\", \"lightmoe\"]\nratios = [0.3, 0.5]\nspeed = false\n" + extra +
         "\n[compress]\nrank = 2\n[train]\nrows = 1\nlength = 40\nlr = 1e-3\n" + train +
         "\n[method.lora]\nlr_scale = 0.5\n[short]\nratios = [0.5]\nsteps_scale = 0.5\n"
         "[[task]]\nname = \"ids\"\ntrain = \"tests/golden/e64k8/golden.safetensors\"\n"
         "test = \"tests/golden/e64k8/golden.safetensors\"\nlr_scale = 2\n";
}

Recipe recipe_of(const TempDir& where, const std::string& text, bool short_form = false) {
  put_file(where / "recipe.toml", text);
  return read_recipe((where / "recipe.toml").string(), short_form);
}

// What scripts read: a line a method, six columns two spaces apart at least, whatever stands in them.
TEST(Recipe, MethodsAreListedInColumns) {
  const ProgramResult run = run_lightmoe({"compress", "--list"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  std::istringstream lines(run.out);
  std::string line;
  std::vector<std::string> names;
  while (std::getline(lines, line)) {
    names.push_back(line.substr(0, line.find(' ')));
    int columns = 1;
    for (size_t at = line.find("  "); at != std::string::npos; at = line.find("  ", line.find_first_not_of(' ', at)))
      ++columns;
    EXPECT_EQ(columns, 6) << line;
  }
  ASSERT_EQ(names.size(), methods().size() + 1);
  for (size_t i = 0; i < methods().size(); ++i) EXPECT_EQ(names[i + 1], methods()[i].name);
}

TEST(Recipe, ReadsMethodsRatiosAndScales) {
  const TempDir where;
  const Recipe recipe = recipe_of(where, recipe_text(where / "out"));
  ASSERT_EQ(recipe.methods.size(), 3u);
  EXPECT_TRUE(recipe.methods[1].ratios.empty());
  EXPECT_DOUBLE_EQ(recipe.methods[1].training.lr, 5e-4);
  EXPECT_EQ(recipe.methods[2].ratios, (std::vector<double>{.3, .5}));
  EXPECT_EQ(recipe.methods[2].options.rank, 2);
  EXPECT_EQ(recipe.methods[2].training.steps, 2);
  EXPECT_EQ(list_runs(recipe).size(), 4u);
  EXPECT_EQ(list_runs(recipe)[3].directory, "ids/lightmoe-r50-s1");
  const Recipe brief = recipe_of(where, recipe_text(where / "out"), true);
  EXPECT_EQ(brief.methods[2].ratios, (std::vector<double>{.5}));
  EXPECT_EQ(brief.methods[2].training.steps, 1);
}

TEST(Recipe, TrainFreeRowsStandBesideRecoveredOnes) {
  const TempDir where;
  std::string text = recipe_text(where / "out", "train_free = [\"lightmoe\", \"aimer\"]\nseeds = [1, 2]");
  text += "[method.aimer]\nratios = [0.25]\n";
  const Recipe recipe = recipe_of(where, text);
  std::vector<std::string> directories;
  for (const RunPlan& run : list_runs(recipe)) directories.push_back(run.directory);
  EXPECT_EQ(directories,
            (std::vector<std::string>{"ids/original", "ids/lora-s1", "ids/lora-s2", "ids/lightmoe-r30-free",
                                      "ids/lightmoe-r50-free", "ids/lightmoe-r30-s1", "ids/lightmoe-r30-s2",
                                      "ids/lightmoe-r50-s1", "ids/lightmoe-r50-s2", "ids/aimer-r25-free"}));
  EXPECT_EQ(chosen_runs(recipe, "-r50-(free|s1)$").size(), 2u);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--only r60: none of the 10 runs"}, [&] { chosen_runs(recipe, "r60"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--only (: "}, [&] { chosen_runs(recipe, "("); }));
  std::string wrong = text;
  wrong.replace(wrong.find("\"aimer\"]"), 7, "\"lora\"");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"recipe.train_free", "lora compresses nothing"},
                         [&] { recipe_of(where, wrong); }));
  wrong = text;
  wrong.replace(wrong.find("[0.25]"), 6, "[1.25]");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"method.aimer.ratios: 1.25 is not"}, [&] { recipe_of(where, wrong); }));
}

TEST(Recipe, UnknownKeysAreErrorsWithTheNearest) {
  const TempDir where;
  const auto refused = [&](const std::string& from, const std::string& to, const std::vector<std::string>& pieces) {
    std::string text = recipe_text(where / "out");
    text.replace(text.find(from), from.size(), to);
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, pieces, [&] { recipe_of(where, text); })) << to;
  };
  refused("ratios = [0.3", "ratois = [0.3", {"recipe.toml:5: recipe.ratois: unknown key", "did you mean ratios?"});
  refused("steps = 2", "setps = 2", {"train.setps", "did you mean steps?"});
  refused("steps = 2", "steps = \"two\"", {"train.steps: expected an integer"});
  refused("steps = 2", "steps = 0", {"must be positive"});
  refused("lr_scale = 0.5", "lr_skale = 0.5", {"method.lora.lr_skale", "did you mean lr_scale?"});
  // Settings of methods that are not chosen are read all the same.
  refused("[method.lora]\n", "[method.full]\nsetps = 1\n[method.lora]\n", {"method.full.setps", "did you mean steps?"});
  refused("[method.lora]\n", "[method.lroa]\nlr = 1\n[method.lora]\n", {"unknown method \"lroa\"", "mean lora?"});
  refused("\"lora\", \"lightmoe\"", "\"lora\", \"lihgtmoe\"",
          {"unknown method \"lihgtmoe\"", "did you mean lightmoe?"});
  refused("[0.3, 0.5]", "[0.3, 1.5]", {"1.5 is not from 0 to less than 1"});
  refused("name = \"ids\"", "nmae = \"ids\"", {"task.name: is missing"});
  refused("name = \"ids\"", "name = \"../ids\"", {"becomes a directory"});
  refused("[compress]", "[comperss]", {"comperss: unknown key", "did you mean compress?"});
  refused("[recipe]", "[recipe", {"recipe.toml:1"});
}

TEST(Recipe, MissingFilesAndImpossibleBudgetsAreRefusedBeforeAnyWork) {
  const TempDir where;
  std::string text = recipe_text(where / "out");
  text.replace(text.find("test = \"tests/golden"), 20, "test = \"tests/silver");
  EXPECT_TRUE(
      fails_with(ErrorKind::kUsage, {"task ids: no file tests/silver"}, [&] { describe(recipe_of(where, text)); }));
  text = recipe_text(where / "out");
  text.replace(text.find("[0.3, 0.5]"), 10, "[0.99]");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"is impossible"}, [&] { run_calibration(recipe_of(where, text), {}); }));
  EXPECT_FALSE(fs::exists(where / "out"));
}

TEST(Run, DoesEveryStageOnceAndReports) {
  const TempDir where;
  std::vector<std::string> said;
  const auto go = [&](const std::string& text) {
    const Recipe recipe = recipe_of(where, text);
    said.clear();
    RunnerOptions options{.say = [&](const std::string& line) { said.push_back(line); }};
    run_calibration(recipe, options);
    EXPECT_TRUE(run_stages(recipe, options, nullptr));
    return make_report(recipe, load_results(recipe));
  };
  const Report report = go(recipe_text(where / "out"));
  EXPECT_EQ(said.size(), 5u);  // calibration and four runs
  ASSERT_EQ(report.rows.size(), 4u);
  EXPECT_EQ(report.tasks[0].metric, "perplexity");
  EXPECT_FALSE(report.tasks[0].higher_is_better);
  EXPECT_EQ(report.original, "original");
  EXPECT_EQ(report.whole_with_adapters, "lora");
  EXPECT_EQ(report.featured, "lightmoe");
  EXPECT_EQ(report.families.at("lightmoe"), "expert replacing");
  EXPECT_LE(report.rows[3].parameters, .5 * 451520);
  EXPECT_EQ(report.rows[3].file_bytes, report.rows[3].live_bytes);
  EXPECT_EQ(report.runs[3].curve.size(), 2u);
  EXPECT_EQ(report.runs[3].curve[0].beta, 1);
  EXPECT_EQ(report.runs[3].replaced.size(), 2u);
  for (const RunResult& r : report.runs) EXPECT_EQ(r.versions, std::vector<std::string>{version()});
  EXPECT_EQ(report.tasks[0].gate_scores.size(), 2u);
  write_report(report, where / "out");
  for (const char* file : {"report.html", "report.md", "report.json"}) EXPECT_TRUE(fs::exists(where / "out" / file));

  go(recipe_text(where / "out"));
  EXPECT_TRUE(said.empty());  // nothing left to do
  fs::remove(where / "out" / "ids" / "lightmoe-r50-s1" / "result.json");
  go(recipe_text(where / "out"));
  EXPECT_EQ(said.size(), 1u);  // evaluated again, not trained again
  EXPECT_EQ(load_results(recipe_of(where, recipe_text(where / "out")))[3].steps, 2);
  // A result made elsewhere keeps its version when the report is written again.
  const fs::path kept = where / "out" / "ids" / "original" / "result.json";
  Json json = read_json_file(kept.string());
  json["versions"] = {"elsewhere"};
  put_file(kept, json.dump());
  EXPECT_NE(to_markdown(go(recipe_text(where / "out"))).find("elsewhere (1 run)"), std::string::npos);
  go(recipe_text(where / "out", "", "steps = 3"));
  EXPECT_EQ(said.size(), 3u);  // the three trained ones; calibration and the original stand
}

// One compression for all seeds and for the row without training, and for all tasks where no data is read.
TEST(Run, SharesWhatDependsOnNeitherSeedNorTask) {
  const TempDir where;
  std::string text =
      recipe_text(where / "out", "train_free = [\"lightmoe\", \"aimer\"]\nseeds = [1, 2]\nkeep_models = false");
  const auto change = [&](const std::string& from, const std::string& to) {
    text.replace(text.find(from), from.size(), to);
  };
  change("\"original\", \"lora\", ", "");
  change("[0.3, 0.5]", "[0.5]");
  text +=
      "[[task]]\nname = \"more\"\ntrain = \"tests/golden/e64k8/golden.safetensors\"\n"
      "test = \"tests/golden/e64k8/golden.safetensors\"\n";
  const Recipe recipe = recipe_of(where, text);
  run_calibration(recipe, {});
  EXPECT_TRUE(run_stages(recipe, {.only = "ids/"}, nullptr));
  const std::vector<RunResult> partly = load_results(recipe, true);
  EXPECT_EQ(partly.size(), 4u);
  EXPECT_EQ(make_report(recipe, partly).missing, 4);
  const auto made = fs::last_write_time(where / "out" / "every.task" / "aimer-r50" / "compressed.key");
  EXPECT_TRUE(run_stages(recipe, {}, nullptr));
  EXPECT_EQ(fs::last_write_time(where / "out" / "every.task" / "aimer-r50" / "compressed.key"), made);
  EXPECT_TRUE(fs::exists(where / "out" / "ids" / "lightmoe-r50" / "compressed" / "model.safetensors"));
  EXPECT_FALSE(fs::exists(where / "out" / "ids" / "lightmoe-r50-s1" / "model"));  // evaluated, then dropped
  const std::vector<RunResult> results = load_results(recipe);
  ASSERT_EQ(results.size(), 8u);
  EXPECT_FALSE(results[0].recovered);
  EXPECT_EQ(results[0].steps, 0);
  EXPECT_TRUE(results[1].recovered);
  EXPECT_NE(results[1].quality(), results[2].quality());  // the seed draws adapters and order
  EXPECT_EQ(results[0].file_bytes, results[0].live_bytes);
  const Report report = make_report(recipe, results);
  ASSERT_EQ(report.rows.size(), 3u);
  EXPECT_EQ(report.rows[0].label(), "lightmoe, no training");
  EXPECT_EQ(report.rows[1].steps, 2);
  EXPECT_EQ(report.missing, 0);
}

// Which method plays which part, and what the slots of each become, whether or not there are results.
TEST(Run, AReportKnowsTheMethodsByWhatTheyAre) {
  const TempDir where;
  std::string text = recipe_text(where / "out");
  const std::string few = "\"original\", \"lora\", \"lightmoe\"";
  text.replace(text.find(few), few.size(), "\"aimer\", " + few + ", \"conmoe\", \"molae\", \"mone\"");
  const Report report = make_report(recipe_of(where, text), {});
  EXPECT_EQ(report.original, "original");
  EXPECT_EQ(report.whole_with_adapters, "lora");
  EXPECT_EQ(report.featured, "lightmoe");
  const std::map<std::string, std::string> families = {{"aimer", "removed experts"}, {"original", kWholeModel},
                                                       {"lora", kWholeModel},        {"lightmoe", "expert replacing"},
                                                       {"conmoe", "shared experts"}, {"molae", "shared factors"},
                                                       {"mone", "constants"}};
  EXPECT_EQ(report.families, families);
}

// Two workers' shares together are all runs.
TEST(Run, WorkersShareTheRuns) {
  const TempDir where;
  const Recipe recipe = recipe_of(where, recipe_text(where / "out"));
  run_calibration(recipe, {});
  for (int64_t worker : {0, 1}) EXPECT_TRUE(run_stages(recipe, {.worker = worker, .workers = 2}, nullptr));
  EXPECT_EQ(load_results(recipe).size(), 4u);
}

// The first process passes a signal on; its workers save and stop, and the next call goes on bit for bit.
TEST(Run, StopsOnASignalAndGoesOn) {
  const TempDir where;
  const auto recipe = [&](const std::string& output) {
    const std::string file = where / (output + ".toml");
    put_file(file, recipe_text(where / output, "", "steps = 40"));
    return file;
  };
  const fs::path log = where / "stopped" / "ids" / "lora-s1" / "train.log.jsonl";
  const ProgramResult stopped =
      run_lightmoe({"run", recipe("stopped"), "--jobs", "2"},
                   {.signal = SIGTERM, .signal_when = [&] { return fs::exists(log) && fs::file_size(log) > 1000; }});
  EXPECT_EQ(stopped.exit_code, 128 + SIGTERM) << stopped.err;
  EXPECT_FALSE(fs::exists(where / "stopped" / "ids" / "lora-s1" / "model"));
  EXPECT_TRUE(fs::exists(where / "stopped" / "ids" / "lora-s1" / "checkpoints"));
  EXPECT_EQ(run_lightmoe({"run", where / "stopped.toml"}).exit_code, 0);
  EXPECT_EQ(run_lightmoe({"run", recipe("straight")}).exit_code, 0);
  const std::string weights = "ids/lora-s1/model/model.safetensors";
  EXPECT_EQ(get_file(where / "stopped" / weights), get_file(where / "straight" / weights));
}

}  // namespace
}  // namespace lightmoe
