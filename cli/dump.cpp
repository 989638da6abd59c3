#include "model/dump.h"

#include <fmt/core.h>

#include <memory>

#include "cli/load.h"
#include "cli/verb.h"
#include "loaders/safetensors.h"
#include "runtime/error.h"

namespace lightmoe::cli {
namespace {

struct Options {
  std::string model, input, output, dtype = "f32";
  bool gradients = false, force = false;
};

void dump(const Options& options) {
  namespace fs = std::filesystem;
  check(options.dtype == "f32" || options.dtype == "bf16", ErrorKind::kUsage, "--dtype {}: expected f32 or bf16",
        options.dtype);
  const fs::path output = options.output;
  check(!fs::exists(output) || (options.force && fs::is_regular_file(output)), ErrorKind::kUsage, "--out {}: exists{}",
        options.output, options.force ? " and is no file" : "; --force replaces it");
  for (const fs::path& in : {fs::path(options.input), fs::path(options.model) / "model.safetensors"}) {
    check(!fs::exists(in) || !fs::exists(output) || !fs::equivalent(in, output), ErrorKind::kUsage,
          "--out {}: is an input", options.output);
  }
  LoadReport report;
  const DumpInput input = read_dump_input(options.input, read_config(options.model));
  const auto model = load_model(options.model, options.dtype == "bf16" ? DType::kBF16 : DType::kF32, &report);
  warn_of_unused(report, options.model);
  const auto tensors = dump_model(*model, input, options.gradients);
  write_safetensors(output, tensors);
  fmt::print("{}: {} tensors of {} x {} tokens\n", options.output, tensors.size(), input.rows, input.length);
}

const RegisterVerb verb{
    {"dump", "Models",
     "Write what a model computes on given token ids: logits, hidden states, routing, losses, gradients",
     "lightmoe dump tests/golden/plain --input tests/golden/plain/golden.safetensors --out /tmp/plain.safetensors "
     "--gradients",
     [](Flags& app) -> VerbAction {
       auto options = std::make_shared<Options>();
       app.add_option("model", options->model, "model directory")->required();
       app.add_option("--input", options->input,
                      "safetensors with input_ids [B,S], and labels, attention_mask if wanted")
           ->required();
       app.add_option("--out", options->output, "safetensors file to write")->required();
       app.add_flag("--gradients", options->gradients,
                    "also grad.<name> of cross-entropy + router_aux_loss_coef * aux");
       app.add_option("--dtype", options->dtype, "of the weights in memory: f32 or bf16; products are f32")
           ->capture_default_str();
       app.add_flag("--force", options->force, "replace the output file");
       return [options] { dump(*options); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
