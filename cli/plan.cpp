#include <fmt/core.h>

#include <filesystem>

#include "cli/load.h"
#include "cli/verb.h"
#include "compress/footprint.h"
#include "compress/text.h"
#include "loaders/json.h"
#include "model/progress.h"
#include "model/slot_table.h"

namespace lightmoe::cli {
namespace {

struct Options {
  std::string model, stored = "bf16", live = "bf16", recompute = "none";
  FootprintRequest request;
  std::vector<int64_t> experts;
  int64_t top_k = 0, width = 0, layers = 0, hidden = 0, sections = 0;
  bool json = false;
};

struct Row {
  std::string name;
  Footprint footprint;
};

Recompute recompute_named(const std::string& name) {
  if (name == "none") return Recompute::kNone;
  if (name == "moe") return Recompute::kMoe;
  check(name == "block", ErrorKind::kUsage, "--recompute {}: expected none, moe or block", name);
  return Recompute::kBlock;
}

DType type_named(const char* flag, const std::string& name) {
  check(name == "f32" || name == "bf16", ErrorKind::kUsage, "{} {}: expected f32 or bf16", flag, name);
  return name == "f32" ? DType::kF32 : DType::kBF16;
}

// The shape with what the flags change. It is checked as a config.json would be.
OlmoeConfig changed(OlmoeConfig c, const Options& o, int64_t experts) {
  if (experts > 0) c.num_experts = experts;
  if (o.top_k > 0) c.num_experts_per_token = o.top_k;
  if (o.width > 0) c.intermediate_size = o.width;
  if (o.layers > 0) c.num_layers = o.layers;
  if (o.hidden > 0) c.hidden_size = o.hidden;
  return parse_config(config_to_json(c), "the planned shape");
}

std::vector<Row> rows_of(const Options& o) {
  const std::optional<OlmoeConfig> named = named_config(o.model);
  const OlmoeConfig config = named ? *named : read_config(o.model);
  const bool changes = !o.experts.empty() || o.top_k + o.width + o.layers + o.hidden + o.sections > 0;
  if (!config.lightmoe_json.empty()) {
    check(!changes, ErrorKind::kUsage,
          "{}: a compressed model; --experts, --top-k, --width, --layers, --hidden and --sections plan stock shapes",
          o.model);
    const std::string name = (std::filesystem::path(o.model) / "config.json").string();
    return {{"compressed",
             plan_footprint(config, slot_tables_from_json(parse_json(config.lightmoe_json, name), config, name),
                            o.request)}};
  }
  std::vector<Row> rows;
  const std::vector<int64_t> all = o.experts.empty() ? std::vector<int64_t>{config.num_experts} : o.experts;
  for (const int64_t experts : all) {
    const OlmoeConfig c = changed(config, o, experts);
    rows.push_back(
        {fmt::format("{} experts, top {}", c.num_experts, c.num_experts_per_token), plan_footprint(c, {}, o.request)});
  }
  if (o.sections > 0) {
    rows.push_back(
        {fmt::format("{} sections", o.sections), plan_sections(changed(config, o, 0), o.sections, o.request)});
  }
  return rows;
}

Json to_json(const Row& row) {
  const Footprint& f = row.footprint;
  Json json = {{"name", row.name},
               {"parameters", f.parameters},
               {"active_parameters", f.active_parameters},
               {"stored_bytes", f.stored_bytes},
               {"live_bytes", f.live_bytes},
               {"kv_bytes_per_token", f.kv_bytes_per_token},
               {"flops_per_token", f.flops_per_token}};
  if (f.training.total_bytes() > 0) {
    json["training_fixed_bytes"] = f.training.fixed.total_bytes();
    json["training_peak_bytes"] = f.training.total_bytes();
  }
  return json;
}

void run_plan(Options& o) {
  o.request.stored = type_named("--stored", o.stored), o.request.live = type_named("--live", o.live);
  o.request.recompute = recompute_named(o.recompute);
  check(o.request.context >= 1, ErrorKind::kUsage, "--context {}: expected at least 1", o.request.context);
  check(o.request.train_tokens >= 0, ErrorKind::kUsage, "--train-tokens {}: expected 0 or more",
        o.request.train_tokens);
  const std::vector<Row> rows = rows_of(o);
  if (o.json) {
    Json all = Json::array();
    for (const Row& row : rows) all.push_back(to_json(row));
    fmt::print("{}\n", all.dump(2));
    return;
  }
  fmt::print("{:<24}{:>12}{:>12}{:>12}{:>12}{:>14}{:>12}\n", "shape", "parameters", "active", "stored", "live",
             "FLOP/token", "training");
  for (const Row& row : rows) {
    const Footprint& f = row.footprint;
    fmt::print("{:<24}{:>12}{:>12}{:>12}{:>12}{:>14}{:>12}\n", row.name, human_count(f.parameters),
               human_count(f.active_parameters), human_bytes(f.stored_bytes), human_bytes(f.live_bytes),
               human_count(f.flops_per_token),
               f.training.total_bytes() > 0 ? human_bytes(f.training.total_bytes()) : "-");
  }
  fmt::print("keys and values {} a token (f32); FLOPs forward, attending to {} tokens\n",
             human_bytes(rows.front().footprint.kv_bytes_per_token), o.request.context);
}

const RegisterVerb verb{
    {"plan", "Models", "What a shape or a compressed model will take: parameters, memory, FLOPs",
     "lightmoe plan olmoe-1b-7b --experts 32 64 128 --train-tokens 4096", [](Flags& app) -> VerbAction {
       auto o = std::make_shared<Options>();
       app.add_option("model", o->model, "model directory, or tiny, mid, olmoe-1b-7b")->required();
       app.add_option("--experts", o->experts, "numbers of experts to plan, a row each");
       app.add_option("--top-k", o->top_k, "experts per token");
       app.add_option("--width", o->width, "of an expert");
       app.add_option("--layers", o->layers, "number of layers");
       app.add_option("--hidden", o->hidden, "hidden width");
       app.add_option("--sections", o->sections, "also a sectional MoE of so many sections");
       app.add_option("--stored", o->stored, "type on disk: bf16, f32")->capture_default_str();
       app.add_option("--live", o->live, "type in memory: bf16, f32")->capture_default_str();
       app.add_option("--context", o->request.context, "tokens that a token attends to")->capture_default_str();
       app.add_option("--train-tokens", o->request.train_tokens, "tokens of a training pass (0 = no training)")
           ->capture_default_str();
       app.add_flag("--train-experts", o->request.train_experts_only, "the rest is frozen in training");
       app.add_option("--recompute", o->recompute, "none, moe, block: as in training")->capture_default_str();
       app.add_flag("--json", o->json, "as JSON");
       return [o] { run_plan(*o); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
