#include <fmt/core.h>

#include <memory>

#include "cli/load.h"
#include "cli/verb.h"
#include "compress/record.h"
#include "compress/unit_split.h"
#include "compress/weights.h"
#include "loaders/output.h"

namespace lightmoe::cli {
namespace {

struct Options {
  std::string model, out, statistics, likeness = "activations", save_dtype = "auto";
  UnitSplitOptions split;
  bool no_selector = false, force = false;
};

void print(const UnitSplitReport& report) {
  if (report.layers.empty()) return;
  fmt::print(
      "held-out choices: share of the blocks' contributions in the half that is picked\n  {:<7}{:>10}{:>10}{:>10}\n",
      "layer", "choices", "selector", "best");
  for (size_t l = 0; l < report.layers.size(); ++l) {
    const UnitSplitReport::Layer& x = report.layers[l];
    fmt::print("  {:<7}{:>10}{:>10.3f}{:>10.3f}\n", l, x.choices, x.selector, x.oracle);
  }
}

void run_split(Options& o) {
  const OlmoeConfig config = read_config(o.model);
  o.split.likeness = parse_unit_likeness(o.likeness);
  o.split.selectors = !o.no_selector;
  OutputDirectory output(o.out, o.force, {o.model});
  std::optional<Statistics> statistics;
  if (!o.statistics.empty()) {
    statistics = load_statistics(o.statistics);
    check_statistics(*statistics, model_fingerprint(Checkpoint(o.model)), config.num_layers, config.num_experts,
                     config.hidden_size, o.statistics);
  }
  const LoadedModel loaded = load({o.model, "f32", "f32"});
  print(split_units(*loaded.model, statistics ? &*statistics : nullptr, o.split));
  save_model(*loaded.model, output.path(), parse_dtype(o.save_dtype, config), int64_t{5} << 30);
  copy_side_files(o.model, output.path());
  output.commit();
  fmt::print("wrote {}: the same function, {} blocks of {} units in every expert{}\n", o.out, o.split.blocks,
             config.intermediate_size / o.split.blocks, o.no_selector ? "" : ", with selectors (eval --unit-blocks)");
}

const RegisterVerb verb{
    {"split-units", "Compression", "Put the units inside experts in blocks, with selectors of those that run",
     "lightmoe split-units demo/base --statistics task.stats.safetensors --blocks 8 -o split",
     [](Flags& app) -> VerbAction {
       auto o = std::make_shared<Options>();
       app.add_option("model", o->model, "model whose slots have experts of their own")->required();
       app.add_option("-o,--output", o->out, "model directory to write")->required();
       app.add_option("--statistics", o->statistics, "calibrate --sample-inputs");
       app.add_option("--blocks", o->split.blocks, "of an expert, all of one size")->capture_default_str();
       app.add_option("--by", o->likeness, "which units are alike: weights, activations")->capture_default_str();
       app.add_flag("--no-selector", o->no_selector, "permute units, nothing else: a stock model stays one");
       app.add_option("--epochs", o->split.epochs, "of the selectors' training")->capture_default_str();
       app.add_option("--lr", o->split.lr, "of the selectors' training")->capture_default_str();
       app.add_option("--seed", o->split.seed, "of clusters and selectors")->capture_default_str();
       app.add_option("--save-dtype", o->save_dtype, "auto (the model's), f32, bf16")->capture_default_str();
       app.add_flag("--force", o->force, "replace the output");
       return [o] { run_split(*o); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
