#include "compress/runner.h"

#include <algorithm>
#include <filesystem>
#include <regex>

#include "compress/router_kd.h"
#include "compress/stages.h"
#include "compress/statistics.h"
#include "compress/text.h"
#include "loaders/json.h"

namespace lightmoe {
namespace {

namespace fs = std::filesystem;

// Files that are not there, budgets that cannot be met, settings out of range: before any work.
void check_recipe(const Recipe& recipe, const OlmoeConfig& config) {
  for (const RecipeTask& task : recipe.tasks) {
    for (const std::string& file : {task.train, task.validation, task.test}) {
      check(file.empty() || fs::is_regular_file(file), ErrorKind::kUsage, "{}: task {}: no file {}", recipe.file,
            task.name, file);
    }
  }
  const Statistics statistics = uniform_statistics(config.num_layers, config.num_experts, config.hidden_size);
  for (const RecipeMethod& method : recipe.methods) {
    const RecipeTraining& t = method.training;
    Annealing{.eps = t.anneal.value_or(0), .shape = parse_anneal_shape(t.anneal_shape), .gamma = t.anneal_gamma}
        .check_valid();
    check(t.length <= config.max_position_embeddings, ErrorKind::kUsage, "{}: length {}: the model has {} positions",
          recipe.file, t.length, config.max_position_embeddings);
    check_options(find_method(method.method), method.options);
    for (const double ratio : method.ratios) {
      MethodOptions options = method.options;
      options.budget.value = ratio;
      find_method(method.method).plan({.config = config, .statistics = statistics, .options = options});
    }
  }
}

// Whether recovery trains what the method says, or something else in its place.
bool trains_by_method(const RecipeTraining& t) { return !t.router_kd && t.extend.empty(); }

int64_t trained_instead(const RecipeTraining& t, const Plan& plan, const ModelSize& size) {
  if (t.router_kd) return live_router_parameters(plan.shapes(), size.hidden);
  return size.layers * extension_parameters(parse_extension(t.extend),
                                            {.hidden = size.hidden, .width = size.width, .slots = size.slots});
}

}  // namespace

std::string describe(const Recipe& recipe) {
  const OlmoeConfig config = read_config(recipe.model);
  check_recipe(recipe, config);
  const ModelSize size = model_size(config);
  const Statistics statistics = uniform_statistics(config.num_layers, config.num_experts, config.hidden_size);
  std::string text =
      fmt::format("{}: {} parameters; {} tasks, {} runs, results in {}\n", recipe.model, human_count(size.total()),
                  recipe.tasks.size(), list_runs(recipe).size(), recipe.output);
  text += fmt::format("{:<22} {:>6} {:>12} {:>12} {:>5} {:>7} {:>9}\n", "method", "ratio", "parameters", "trainable",
                      "rank", "steps", "lr");
  for (const RecipeMethod& recipe_method : recipe.methods) {
    const Method& method = find_method(recipe_method.method);
    for (const double ratio : recipe_method.ratios.empty() ? std::vector<double>{0} : recipe_method.ratios) {
      MethodOptions options = recipe_method.options;
      options.budget.value = ratio;
      const MethodInput input{.config = config, .statistics = statistics, .options = options};
      const Plan plan = method.plan(input);
      const bool training = trains(recipe_method), adapters = trains_by_method(recipe_method.training);
      const int64_t trained =
          adapters ? trainable_parameters(method, input, plan) : trained_instead(recipe_method.training, plan, size);
      text += fmt::format("{:<22} {:>6} {:>12} {:>12} {:>5} {:>7} {:>9}\n", recipe_method.name,
                          recipe_method.ratios.empty() ? "-" : fmt::format("{:g} %", 100 * ratio),
                          human_count(stored_parameters(plan.shapes(), size)), training ? human_count(trained) : "-",
                          training && adapters ? std::to_string(recovery_rank(method, input, plan)) : "-",
                          training ? std::to_string(recipe_method.training.steps) : "-",
                          training ? fmt::format("{:g}", recipe_method.training.lr) : "-");
    }
  }
  return text + "steps and rates are before a task's own scales; sizes vary a little with what calibration finds\n";
}

std::vector<RunPlan> list_runs(const Recipe& recipe) {
  std::vector<RunPlan> runs;
  for (size_t t = 0; t < recipe.tasks.size(); ++t) {
    for (size_t m = 0; m < recipe.methods.size(); ++m) {
      const RecipeMethod& method = recipe.methods[m];
      const std::vector<double> ratios = method.ratios.empty() ? std::vector<double>{0} : method.ratios;
      for (const double ratio : ratios) {
        std::string directory = recipe.tasks[t].name + "/" + method.name;
        if (!method.ratios.empty()) directory += fmt::format("-r{:g}", 100 * ratio);
        if (!trains(method)) {
          runs.push_back({.task = t,
                          .method = m,
                          .ratio = ratio,
                          .directory = directory + (method.ratios.empty() ? "" : "-free")});
          continue;
        }
        for (const int64_t seed : recipe.seeds) {
          runs.push_back({.task = t,
                          .method = m,
                          .ratio = ratio,
                          .seed = seed,
                          .directory = fmt::format("{}-s{}", directory, seed)});
        }
      }
    }
  }
  return runs;
}

std::vector<RunPlan> chosen_runs(const Recipe& recipe, const std::string& only) {
  std::vector<RunPlan> runs = list_runs(recipe);
  if (only.empty()) return runs;
  try {
    const std::regex pattern(only);
    std::erase_if(runs, [&](const RunPlan& run) { return !std::regex_search(run.directory, pattern); });
  } catch (const std::regex_error& error) {
    fail(ErrorKind::kUsage, "--only {}: {}", only, error.what());
  }
  check(!runs.empty(), ErrorKind::kUsage, "--only {}: none of the {} runs has a match, the first is {}", only,
        list_runs(recipe).size(), list_runs(recipe).front().directory);
  return runs;
}

void run_calibration(const Recipe& recipe, const RunnerOptions& options) {
  check_recipe(recipe, read_config(recipe.model));
  fs::create_directories(recipe.output);
  Stages stages(recipe, options);
  const bool needed = std::any_of(recipe.methods.begin(), recipe.methods.end(),
                                  [](const RecipeMethod& m) { return find_method(m.method).compresses; });
  for (size_t t = 0; needed && t < recipe.tasks.size(); ++t) stages.calibrate(t);
}

bool run_stages(const Recipe& recipe, const RunnerOptions& options, int* stopped_by) {
  Stages stages(recipe, options);
  const std::vector<RunPlan> runs = chosen_runs(recipe, options.only);
  for (size_t i = 0; i < runs.size(); ++i) {
    if (static_cast<int64_t>(i) % options.workers != options.worker) continue;
    if (stages.run(runs[i], fmt::format("{}/{}", i + 1, runs.size()))) continue;
    if (stopped_by != nullptr) *stopped_by = stages.exit_code();
    return false;
  }
  return true;
}

void measure_speeds(const Recipe& recipe, const RunnerOptions& options) {
  if (!recipe.measure_speed) return;
  Stages stages(recipe, options);
  for (const RunPlan& run : list_runs(recipe)) {
    if (stages.stands_for_its_row(run)) stages.measure(run);
  }
}

std::vector<RunResult> load_results(const Recipe& recipe, bool partly) {
  std::vector<RunResult> results;
  for (const RunPlan& plan : list_runs(recipe)) {
    const fs::path directory = fs::path(recipe.output) / plan.directory;
    const std::string file = (directory / "result.json").string();
    if (partly && !fs::exists(file)) continue;
    check(fs::exists(file), ErrorKind::kInput, "{}: no such result yet; `lightmoe run {}` makes it", file, recipe.file);
    results.push_back(result_from_json(read_json_file(file), file));
    if (!fs::exists(directory / "speed.json")) continue;
    const Json speed = read_json_file((directory / "speed.json").string());
    if (speed.value("key", "") != results.back().key) continue;  // of another model
    results.back().prefill_tokens_per_second = speed.value("prefill_tokens_per_second", 0.0);
    results.back().decode_tokens_per_second = speed.value("decode_tokens_per_second", 0.0);
  }
  return results;
}

}  // namespace lightmoe
