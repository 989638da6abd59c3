#include <fmt/format.h>

#include <memory>

#include "cli/verb.h"
#include "compress/diversity.h"
#include "compress/weights.h"
#include "loaders/json.h"
#include "loaders/safetensors_header.h"
#include "model/moe_extension.h"
#include "model/summary.h"

namespace lightmoe::cli {
namespace {

struct Options {
  std::string model;
  bool tensors = false, json = false, diversity = false;
  std::string statistics;
  int64_t sample = 256;
};

constexpr double kGiB = 1 << 30;

std::string optional_text(const auto& value) { return value ? fmt::format("{}", *value) : "none"; }

std::string dtypes_text(const StoredCount& count) {
  std::string text;
  for (const auto& [dtype, bytes] : count.dtype_bytes)
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", dtype, bytes);
  return text;
}

void print_config(const ModelSummary& s) {
  const OlmoeConfig& c = s.config;
  fmt::print("OlmoeForCausalLM, {} experts\n", s.layout);
  fmt::print("  hidden {}, layers {}, heads {} (kv {}) of {}, experts {} top-{} of width {}\n", c.hidden_size,
             c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim(), c.num_experts, c.num_experts_per_token,
             c.intermediate_size);
  fmt::print("  vocabulary {}, positions {}, rope_theta {}, rms_norm_eps {}, clip_qkv {}, norm_topk_prob {}, tied {}\n",
             c.vocab_size, c.max_position_embeddings, c.rope_theta, c.rms_norm_eps, optional_text(c.clip_qkv),
             c.norm_topk_prob, c.tie_word_embeddings);
  fmt::print("  eos {}, pad {}, bos {}, router_aux_loss_coef {}\n", fmt::join(c.eos_token_ids, " "),
             optional_text(c.pad_token_id), optional_text(c.bos_token_id), c.router_aux_loss_coef);
}

void print_count(std::string_view name, const StoredCount& count, int64_t all_bytes) {
  if (count.tensors == 0) return;
  fmt::print("  {:<11}{:>8}{:>16}{:>16}{:>9.3f}{:>7.1f}%  {}\n", name, count.tensors, count.parameters, count.bytes,
             static_cast<double>(count.bytes) / kGiB,
             100.0 * static_cast<double>(count.bytes) / static_cast<double>(std::max<int64_t>(all_bytes, 1)),
             dtypes_text(count));
}

void print_layers(const ModelSummary& s) {
  fmt::print("slot tables ({} slots a layer)\n  {:<7}{:>6}{:>8}{:>9}{:>10}{:>7}{:>9}{:>10}{:>8}{:>10}{:>9}{:>12}\n",
             s.config.num_experts, "layer", "own", "shared", "sharing", "borrowed", "zero", "removed", "constant",
             "latent", "adapters", "rank", "units");
  for (size_t l = 0; l < s.layers.size(); ++l) {
    const LayerSummary& x = s.layers[l];
    const auto range = [](int64_t low, int64_t high) {
      return low == high ? fmt::format("{}", high) : fmt::format("{}-{}", low, high);
    };
    const std::string units = x.widths.empty() ? "-" : range(x.widths.front(), x.widths.back());
    fmt::print("  {:<7}{:>6}{:>8}{:>9}{:>10}{:>7}{:>9}{:>10}{:>8}{:>10}{:>9}{:>12}\n", l, x.own, x.shared,
               x.sharing_slots, x.borrowed, x.zero_slots, x.removed_slots, x.constant_slots, x.latent_slots, x.adapters,
               range(x.smallest_rank, x.largest_rank), units);
  }
  for (size_t l = 0; l < s.layers.size(); ++l) {
    const LayerSummary& x = s.layers[l];
    if (x.latent_slots > 0) {
      fmt::print("  layer {}: {} latents of size {}, {} of {} shared projections{}{}\n", l, x.latent_slots,
                 x.latent_size, x.latent_mix ? "silu of mixes" : "one each", x.projections,
                 x.projection_rank > 0 ? fmt::format(" of rank {}", x.projection_rank) : "",
                 x.latent_down ? ", down too" : "");
    }
    if (!x.extension.empty() && (l == 0 || x.extension != s.layers[l - 1].extension))
      fmt::print("  extension from layer {} on: {}  ({})\n", l, x.extension,
                 find_extension(x.extension.substr(0, x.extension.find(':'))).summary);
  }
  fmt::print(
      "  own: stored experts of one slot; shared: of several slots (sharing); borrowed: of both, stored by "
      "another layer; zero: slots whose expert is W = 0; units: width of the stored experts\n");
}

void print_tensors(const std::string& model) {
  const Checkpoint files(model);
  for (const std::string& name : files.names()) {
    const TensorInfo& info = files.info(name);
    fmt::print("{}  {} {}  {} bytes  {}\n", printable(name, 4096), info.file_dtype, shape_text(info.shape),
               info.bytes(), files.file_of(name).path().filename().string());
  }
}

Json to_json(const StoredCount& count) {
  return {{"tensors", count.tensors},
          {"parameters", count.parameters},
          {"bytes", count.bytes},
          {"dtype_bytes", count.dtype_bytes}};
}

Json to_json(const ModelSummary& s, const std::string& model, bool tensors) {
  Json out = {{"model", model}, {"layout", s.layout}, {"config", parse_json(config_to_json(s.config), "config.json")}};
  out["total"] = to_json(s.total);
  for (int k = 0; k < kNumParameterKinds; ++k) {
    out["kinds"][std::string(name_of(static_cast<ParameterKind>(k)))] = to_json(s.kinds[static_cast<size_t>(k)]);
  }
  out["kinds"]["other"] = to_json(s.other);
  out["missing_tensors"] = s.missing;
  out["active_parameters"] = s.active_parameters;
  for (const auto& file : s.files) out["files"][file.name] = to_json(file.count);
  for (const LayerSummary& x : s.layers) {
    out["layers"].push_back({{"own", x.own},
                             {"shared", x.shared},
                             {"sharing_slots", x.sharing_slots},
                             {"zero_slots", x.zero_slots},
                             {"removed_slots", x.removed_slots},
                             {"constant_slots", x.constant_slots},
                             {"latent_slots", x.latent_slots},
                             {"latent_size", x.latent_size},
                             {"projections", x.projections},
                             {"projection_rank", x.projection_rank},
                             {"latent_mix", x.latent_mix},
                             {"latent_down", x.latent_down},
                             {"borrowed", x.borrowed},
                             {"adapters", x.adapters},
                             {"smallest_rank", x.smallest_rank},
                             {"largest_rank", x.largest_rank},
                             {"widths", x.widths},
                             {"extension", x.extension}});
  }
  out["tokenizer"] = s.has_tokenizer;
  out["complete_marker"] = s.has_marker;
  if (!tensors) return out;
  const Checkpoint files(model);
  for (const std::string& name : files.names()) {
    const TensorInfo& info = files.info(name);
    out["tensors"].push_back(
        {{"name", name}, {"dtype", info.file_dtype}, {"shape", info.shape}, {"bytes", info.bytes()}});
  }
  return out;
}

std::vector<LayerDiversity> diversity_of(const Options& o) {
  if (o.statistics.empty()) return expert_diversity(o.model, nullptr, o.sample);
  const Statistics statistics = load_statistics(o.statistics);
  const OlmoeConfig c = read_config(o.model);
  check(statistics.num_layers == c.num_layers && statistics.hidden == c.hidden_size, ErrorKind::kInput,
        "{}: of {} layers of width {}, the model has {} of {}", o.statistics, statistics.num_layers, statistics.hidden,
        c.num_layers, c.hidden_size);
  return expert_diversity(o.model, &statistics, o.sample);
}

void print(const std::vector<LayerDiversity>& layers, bool outputs) {
  fmt::print("cosine of pairs of stored experts\n  {:<7}{:>9}{:>10}{:>10}{:>10}", "layer", "experts", "weights", "|w|",
             "largest");
  fmt::print("{}", outputs ? fmt::format("{:>10}{:>10}{:>10}\n", "outputs", "|o|", "largest") : "\n");
  for (const LayerDiversity& l : layers) {
    fmt::print("  {:<7}{:>9}{:>10.4f}{:>10.4f}{:>10.4f}", l.layer, l.experts, l.weights.mean, l.weights.mean_abs,
               l.weights.largest);
    if (outputs) fmt::print("{:>10.4f}{:>10.4f}{:>10.4f}", l.outputs.mean, l.outputs.mean_abs, l.outputs.largest);
    fmt::print("\n");
  }
}

Json to_json(const CosineSummary& s) { return {{"mean", s.mean}, {"mean_abs", s.mean_abs}, {"largest", s.largest}}; }

Json to_json(const std::vector<LayerDiversity>& layers, bool outputs) {
  Json all = Json::array();
  for (const LayerDiversity& l : layers) {
    Json& one = all.emplace_back(Json{{"layer", l.layer}, {"experts", l.experts}, {"weights", to_json(l.weights)}});
    if (outputs) one["outputs"] = to_json(l.outputs);
  }
  return all;
}

void inspect(const Options& options) {
  check(options.diversity || options.statistics.empty(), ErrorKind::kUsage, "--statistics serves --diversity");
  const ModelSummary s = summarize_model(options.model);
  if (options.json) {
    Json out = to_json(s, options.model, options.tensors);
    if (options.diversity) out["diversity"] = to_json(diversity_of(options), !options.statistics.empty());
    fmt::print("{}\n", out.dump(2, ' ', false, Json::error_handler_t::replace));
    return;
  }
  print_config(s);
  fmt::print("  {:<11}{:>8}{:>16}{:>16}{:>9}{:>8}  bytes by dtype\n", "kind", "tensors", "parameters", "bytes", "GiB",
             "share");
  for (int k = 0; k < kNumParameterKinds; ++k) {
    print_count(name_of(static_cast<ParameterKind>(k)), s.kinds[static_cast<size_t>(k)], s.total.bytes);
  }
  print_count("other", s.other, s.total.bytes);
  print_count("total", s.total, s.total.bytes);
  fmt::print("  a token meets at most {} parameters\n", s.active_parameters);
  if (s.missing > 0)
    fmt::print("  {} tensors that the config asks for are missing (lightmoe verify names them)\n", s.missing);
  if (!s.layers.empty()) print_layers(s);
  for (const auto& file : s.files)
    fmt::print("file {}: {} tensors, {} bytes\n", file.name, file.count.tensors, file.count.bytes);
  fmt::print("tokenizer.json {}, completeness marker {}\n", s.has_tokenizer ? "yes" : "no",
             s.has_marker ? "yes" : "no");
  if (options.diversity) print(diversity_of(options), !options.statistics.empty());
  if (options.tensors) print_tensors(options.model);
}

const RegisterVerb verb{
    {"inspect", "Models", "Show what a model directory holds: shape, parameters and bytes by kind, slot table",
     "lightmoe inspect demo/base --tensors", [](Flags& app) -> VerbAction {
       auto options = std::make_shared<Options>();
       app.add_option("model", options->model, "model directory")->required();
       app.add_flag("--tensors", options->tensors, "list every tensor");
       app.add_flag("--diversity", options->diversity,
                    "cosines of the experts' weights; with --statistics of their outputs too");
       app.add_option("--statistics", options->statistics, "calibrate --sample-inputs");
       app.add_option("--sample", options->sample, "tokens of it that --diversity looks at")->capture_default_str();
       app.add_flag("--json", options->json, "as one JSON object");
       return [options] { inspect(*options); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
