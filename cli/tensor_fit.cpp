#include "compress/tensor_fit.h"

#include <fmt/core.h>

#include "cli/verb.h"
#include "compress/weights.h"
#include "loaders/json.h"

namespace lightmoe::cli {
namespace {

struct Options {
  std::string model, form = "cp", matrix = "gate";
  int64_t layer = 0, sweeps = 20;
  std::vector<int64_t> ranks = {16};
  uint64_t seed = 1;
  bool json = false;
};

ExpertMatrix matrix_named(const std::string& name) {
  if (name == "gate") return ExpertMatrix::kGate;
  if (name == "up") return ExpertMatrix::kUp;
  check(name == "down", ErrorKind::kUsage, "--matrix {}: expected gate, up or down", name);
  return ExpertMatrix::kDown;
}

// All experts of a layer, [E,P,Q].
Tensor stacked(const Options& o) {
  const OlmoeConfig config = read_config(o.model);
  check(config.lightmoe_json.empty(), ErrorKind::kInput, "{}: a compressed model, expected the original", o.model);
  check(o.layer >= 0 && o.layer < config.num_layers, ErrorKind::kUsage, "--layer {}: expected 0 to {}", o.layer,
        config.num_layers - 1);
  const ExpertMatrix matrix = matrix_named(o.matrix);
  const Checkpoint files(o.model);
  const ExpertSource source(files, config);
  const std::vector<int64_t> shape = expert_matrix_shape(config, matrix);
  const Tensor all = Tensor::empty({config.num_experts, shape[0], shape[1]}, DType::kF64);
  for (int64_t e = 0; e < config.num_experts; ++e) source.place(o.layer, e, matrix).read_rows(0, all.row(e));
  return all;
}

void run_fit(const Options& o) {
  check(o.form == "cp" || o.form == "ring", ErrorKind::kUsage, "--form {}: expected cp or ring", o.form);
  for (const int64_t rank : o.ranks) {
    check(rank >= 1 && rank <= 4096, ErrorKind::kUsage, "--rank {}: expected 1 to 4096", rank);
  }
  check(o.sweeps >= 1, ErrorKind::kUsage, "--sweeps {}: expected at least 1", o.sweeps);
  const Tensor w = stacked(o);
  Json rows = Json::array();
  for (const int64_t rank : o.ranks) {
    const bool cp = o.form == "cp";
    const double error =
        cp ? fit_cp(w, rank, o.sweeps, o.seed).relative_error : fit_ring(w, rank, o.sweeps, o.seed).relative_error;
    const int64_t parameters = (w.dim(0) + w.dim(1) + w.dim(2)) * (cp ? rank : rank * rank);
    rows.push_back({{"form", o.form},
                    {"rank", rank},
                    {"parameters", parameters},
                    {"share", static_cast<double>(parameters) / static_cast<double>(w.numel())},
                    {"relative_error", error}});
  }
  if (o.json) {
    fmt::print("{}\n", rows.dump(2));
    return;
  }
  fmt::print("layer {}, {} of {} experts, {} x {}\n{:<6}{:>6}{:>12}{:>9}{:>16}\n", o.layer, o.matrix, w.dim(0),
             w.dim(1), w.dim(2), "form", "rank", "parameters", "share", "relative error");
  for (const Json& row : rows) {
    fmt::print("{:<6}{:>6}{:>12}{:>8.1f}%{:>16.4f}\n", o.form, row["rank"].get<int64_t>(),
               row["parameters"].get<int64_t>(), 100 * row["share"].get<double>(), row["relative_error"].get<double>());
  }
}

const RegisterVerb verb{
    {"tensor-fit", "Compression", "How far a layer's experts are from a CP or tensor-ring form (muMoE)",
     "lightmoe tensor-fit demo/base --form cp --rank 16 64 256 --matrix gate", [](Flags& app) -> VerbAction {
       auto o = std::make_shared<Options>();
       app.add_option("model", o->model, "original model directory")->required();
       app.add_option("--form", o->form, "cp, ring")->capture_default_str();
       app.add_option("--rank", o->ranks, "ranks, a row each")->capture_default_str();
       app.add_option("--matrix", o->matrix, "gate, up, down")->capture_default_str();
       app.add_option("--layer", o->layer, "whose experts")->capture_default_str();
       app.add_option("--sweeps", o->sweeps, "rounds of alternating least squares")->capture_default_str();
       app.add_option("--seed", o->seed, "of the first factors")->capture_default_str();
       app.add_flag("--json", o->json, "as JSON");
       return [o] { run_fit(*o); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
