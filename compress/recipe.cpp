#include "compress/recipe.h"

#include <algorithm>
#include <cmath>

#include "compress/toml_reader.h"
#include "model/eval.h"
#include "runtime/nearest.h"

namespace lightmoe {
namespace {

void read_training(TomlReader& in, RecipeTraining& t) {
  in.read("steps", t.steps);
  in.read("rows", t.rows);
  in.read("length", t.length);
  in.read("accumulate", t.accumulate);
  in.read("pack", t.pack);
  in.read("lr", t.lr);
  in.read("schedule", t.schedule);
  in.read("warmup", t.warmup);
  in.read("min_lr_ratio", t.min_lr_ratio);
  in.read("weight_decay", t.weight_decay);
  in.read("clip", t.clip);
  in.read("aux_coef", t.aux_coef);
  in.read("entropy_coef", t.entropy_coef);
  in.read("beta1", t.beta1);
  in.read("beta2", t.beta2);
  in.read("save_every", t.save_every);
  in.read("eval_every", t.eval_every);
  std::string recompute;
  if (in.read("recompute", recompute)) {
    if (recompute == "none")
      t.recompute = Recompute::kNone;
    else if (recompute == "moe")
      t.recompute = Recompute::kMoe;
    else if (recompute == "block")
      t.recompute = Recompute::kBlock;
    else
      in.fail_at("recompute", "expected none, moe or block");
  }
  double anneal = 0;
  if (in.read("anneal", anneal)) t.anneal = anneal;
  in.read("anneal_shape", t.anneal_shape);
  in.read("anneal_gamma", t.anneal_gamma);
  in.read("distill", t.distill);
  in.read("distill_temperature", t.distill_temperature);
  in.read("router_kd", t.router_kd);
  if (in.read("extend", t.extend)) parse_extension(t.extend);
  in.read("merge", t.merge);
  if (t.steps < 1 || t.rows < 1 || t.length < 2 || t.accumulate < 1 || !(t.lr > 0)) {
    in.fail_at("steps", "steps, rows, accumulate and lr must be positive, length at least 2");
  }
}

void read_method_options(TomlReader& in, MethodOptions& o) {
  std::string text;
  in.read("bases", o.bases);
  in.read("rank", o.rank);
  in.read("method_rank", o.method_rank);
  if (in.read("selection", text)) o.selection.rule = parse_selection_rule(text);
  in.read("alpha", o.selection.alpha);
  in.read("clip_width", o.selection.clip);
  in.read("redirect", o.redirect);
  in.read("refit", o.refit);
  if (in.read("starved", text)) o.selection.starved = parse_starved_policy(text);
  if (in.read("adapter_init", text)) o.adapter_init = parse_adapter_init(text);
  in.read("adapter_std", o.adapter_std);
  if (in.read("importance", text)) o.selection.importance = parse_importance(text);
  if (in.read("rank_allocation", text)) o.rank_allocation = parse_rank_allocation(text);
  in.read("align", o.align);
  in.read("latent_size", o.latent.size);
  in.read("latent_group", o.latent.group);
  in.read("latent_bases", o.latent.bases);
  in.read("latent_down", o.latent.down);
  in.read("fit_steps", o.latent.fit_steps);
  if (in.read("ratio_of", text)) {
    if (text == "model")
      o.budget.kind = BudgetKind::kWholeModel;
    else if (text == "experts")
      o.budget.kind = BudgetKind::kExperts;
    else
      in.fail_at("ratio_of", "expected model or experts");
  }
  if (o.latent.size < 0 || o.latent.group < 1 || o.latent.bases < 0 || o.latent.fit_steps < 0) {
    in.fail_at("latent_size", "latent_size, latent_bases and fit_steps must not be negative, latent_group positive");
  }
  if (o.bases < 1 || o.rank < 1 || o.method_rank < 0) in.fail_at("rank", "bases and rank must be positive");
}

void read_calibration(TomlReader& in, CalibrateOptions& c) {
  in.read("tokens", c.tokens);
  in.read("length", c.length);
  in.read("batch_tokens", c.batch_tokens);
  in.read("sample_tokens", c.sample_tokens);
  in.read("sample_length", c.sample_length);
  in.read("seed", c.seed);
  in.finish();
}

RecipeTask read_task(const toml::table& table, const std::string& file) {
  TomlReader in(table, file, "task");
  RecipeTask task;
  for (const char* key : {"name", "train", "test"}) in.require_key(key);
  in.read("name", task.name);
  task.title = task.name;
  in.read("title", task.title);
  in.read("scenario", task.scenario);
  in.read("train", task.train);
  in.read("validation", task.validation);
  in.read("test", task.test);
  if (in.read("metric", task.metric)) parse_eval_metric(task.metric);
  in.read("steps_scale", task.steps_scale);
  in.read("lr_scale", task.lr_scale);
  in.finish();
  const bool plain =
      !task.name.empty() && task.name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-_") == std::string::npos;
  if (!plain) in.fail_at("name", "expected lower-case letters, digits, - and _ (it becomes a directory)");
  if (!(task.steps_scale > 0 && task.lr_scale > 0)) in.fail_at("steps_scale", "scales must be positive");
  return task;
}

// What [recipe] and [short] choose by name, before it is resolved.
struct Choice {
  std::vector<std::string> methods, train_free, tasks;
  std::vector<double> ratios = {0.5};
  double steps_scale = 1;
};

void check_ratios(const TomlReader& in, const std::vector<double>& ratios) {
  if (ratios.empty()) in.fail_at("ratios", "the list is empty");
  for (const double ratio : ratios) {
    if (!(ratio >= 0 && ratio < 1)) in.fail_at("ratios", fmt::format("{:g} is not from 0 to less than 1", ratio));
  }
}

void read_choice(TomlReader& in, Choice& choice, Recipe& recipe) {
  in.read("methods", choice.methods);
  in.read("train_free", choice.train_free);
  in.read("tasks", choice.tasks);
  in.read("ratios", choice.ratios);
  in.read("seeds", recipe.seeds);
  in.read("steps_scale", choice.steps_scale);
  in.read("eval_limit", recipe.eval_limit);
  in.read("calibration_tokens", recipe.calibrate.tokens);
  in.read("output", recipe.output);
  in.read("speed", recipe.measure_speed);
  if (recipe.seeds.empty()) in.fail_at("seeds", "the list is empty");
  check_ratios(in, choice.ratios);
}

struct Scales {
  double lr = 1, steps = 1;
};

// [method.NAME], over what [train] and [compress] say.
void read_own_settings(TomlReader& root, const std::string& name, const toml::node& node, RecipeMethod& method,
                       Scales& scales) {
  if (!node.is_table()) root.fail_at("method", fmt::format("method.{} is not a table", name));
  TomlReader in(*node.as_table(), root.file(), "method." + name);
  in.read("method", method.method);
  in.read("note", method.note);
  if (in.read("ratios", method.ratios)) check_ratios(in, method.ratios);
  in.read("lr_scale", scales.lr);
  read_training(in, method.training);
  read_method_options(in, method.options);
  in.finish();
}

void resolve_methods(Recipe& recipe, const Choice& choice, TomlReader& root, const RecipeMethod& common) {
  const toml::table none;
  const toml::table* found = root.table("method");
  const toml::table& settings = found == nullptr ? none : *found;
  const auto contains = [](const std::vector<std::string>& list, const std::string& name) {
    return std::find(list.begin(), list.end(), name) != list.end();
  };
  std::vector<std::string> names = choice.methods;
  for (const std::string& name : choice.train_free) {
    if (!contains(names, name)) names.push_back(name);
  }
  for (const std::string& name : names) {
    RecipeMethod method = common;
    method.name = method.method = name;
    Scales scales{.steps = choice.steps_scale};
    if (const toml::node* own = settings.get(name)) read_own_settings(root, name, *own, method, scales);
    const Method& registered = find_method(method.method);
    method.training.lr *= scales.lr;
    method.training.steps =
        std::max<int64_t>(1, std::llround(static_cast<double>(method.training.steps) * scales.steps));
    if (!registered.compresses) method.ratios.clear();
    if (registered.compresses && method.ratios.empty()) method.ratios = choice.ratios;
    if (contains(choice.train_free, name)) {
      if (!registered.compresses) root.fail_at("recipe.train_free", name + " compresses nothing: it has no such row");
      recipe.methods.push_back(method);
      recipe.methods.back().recover = false;
    }
    if (contains(choice.methods, name)) recipe.methods.push_back(std::move(method));
  }
  check(!recipe.methods.empty(), ErrorKind::kUsage, "{}: no methods", root.file());
  // Settings of methods that are not chosen this time: a mistake in them is a mistake all the same.
  for (const auto& [key, node] : settings) {
    const std::string name(key.str());
    if (contains(names, name)) continue;
    RecipeMethod method = common;
    Scales scales;
    method.method = name;
    read_own_settings(root, name, node, method, scales);
    find_method(method.method);
  }
}

// [[task]]: all are read, the chosen ones are kept.
void read_tasks(TomlReader& root, const Choice& choice, Recipe& recipe) {
  std::vector<std::string> names;
  for (const toml::node& node : *root.tables("task")) {
    RecipeTask task = read_task(*node.as_table(), root.file());
    if (std::find(names.begin(), names.end(), task.name) != names.end())
      root.fail_at("task", "\"" + task.name + "\" stands twice");
    names.push_back(task.name);
    const bool chosen =
        choice.tasks.empty() || std::find(choice.tasks.begin(), choice.tasks.end(), task.name) != choice.tasks.end();
    if (chosen) recipe.tasks.push_back(std::move(task));
  }
  for (const std::string& name : choice.tasks) {
    if (std::find(names.begin(), names.end(), name) != names.end()) continue;
    const std::string near = nearest(name, names);
    root.fail_at("task",
                 fmt::format("there is no task \"{}\"{}", name, near.empty() ? "" : "; did you mean " + near + "?"));
  }
}

}  // namespace

bool trains(const RecipeMethod& method) {
  const Method& registered = find_method(method.method);
  const bool instead = (method.training.router_kd || !method.training.extend.empty()) && registered.compresses;
  return method.recover && (instead || registered.trainable != Trainable::kNothing);
}

Recipe read_recipe(const std::string& file, bool short_form) {
  const toml::table parsed = parse_toml_file(file);
  TomlReader root(parsed, file, "");
  Recipe recipe{.file = file};
  Choice choice;
  for (const char* key : {"recipe", "task"}) root.require_key(key);
  {
    TomlReader in(*root.table("recipe"), file, "recipe");
    for (const char* key : {"model", "output", "methods"}) in.require_key(key);
    in.read("model", recipe.model);
    in.read("title", recipe.title);
    in.read("eval_batch", recipe.eval_batch);
    in.read("eval_max_new_tokens", recipe.eval_max_new_tokens);
    in.read("keep_models", recipe.keep_models);
    std::string dtype = "source";
    in.read("save_dtype", dtype);
    recipe.save_source_dtype = dtype == "source";
    if (dtype == "bf16")
      recipe.save_dtype = DType::kBF16;
    else if (dtype != "f32" && dtype != "source")
      in.fail_at("save_dtype", "expected source, f32 or bf16");
    read_choice(in, choice, recipe);
    in.finish();
  }
  if (const toml::table* table = root.table("calibrate")) {
    TomlReader in(*table, file, "calibrate");
    read_calibration(in, recipe.calibrate);
  }
  if (const toml::table* table = root.table("short"); table != nullptr && short_form) {
    TomlReader in(*table, file, "short");
    read_choice(in, choice, recipe);
    in.finish();
  }
  RecipeMethod common;
  if (const toml::table* table = root.table("train")) {
    TomlReader in(*table, file, "train");
    read_training(in, common.training);
    in.finish();
  }
  if (const toml::table* table = root.table("compress")) {
    TomlReader in(*table, file, "compress");
    read_method_options(in, common.options);
    in.finish();
  }
  resolve_methods(recipe, choice, root, common);
  read_tasks(root, choice, recipe);
  root.finish();
  return recipe;
}

}  // namespace lightmoe
