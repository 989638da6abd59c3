#include <cmath>

#include "cli/compression_flags.h"
#include "cli/verb.h"
#include "compress/exporter.h"
#include "compress/text.h"

namespace lightmoe::cli {
namespace {

struct Options {
  ExportJob job;
  std::string format = "hf", dtype = "keep";
  double max_shard_gib = 5;
};

void run_export(Options& o) {
  check(o.format == "hf", ErrorKind::kUsage, "--format {}: expected hf", o.format);
  check(o.max_shard_gib > 0, ErrorKind::kUsage, "--max-shard-gib {:g}: expected a positive number", o.max_shard_gib);
  o.job.dtype = parse_output_dtype(o.dtype);
  o.job.max_shard_bytes = std::llround(o.max_shard_gib * 0x1p30);
  o.job.say = [](const std::string& line) { fmt::print(stderr, "{}\n", line); };
  const ExportReport report = export_to_hugging_face(o.job);
  fmt::print("wrote        {} (a stock OlmoeForCausalLM)\n", o.job.output.string());
  fmt::print("weights      {} -> {}\n", human_bytes(report.compressed_bytes), human_bytes(report.written_bytes));
  if (report.num_experts < report.original_experts) {
    fmt::print("experts      {} of {} per layer: the others were removed, num_experts says so\n", report.num_experts,
               report.original_experts);
  } else {
    fmt::print("note         every slot has a full expert again, so this form saves no memory\n");
  }
  fmt::print("peak RSS     {}\n", human_bytes(process_peak_rss_bytes()));
}

const RegisterVerb verb{
    {"export", "Compression", "A compressed model as a stock Hugging Face directory",
     "lightmoe export olmoe-math-50 --format hf -o olmoe-math-50-hf", [](Flags& app) -> VerbAction {
       auto o = std::make_shared<Options>();
       app.add_option("model", o->job.model, "compressed model directory")->required();
       app.add_option("-o,--output", o->job.output, "directory to write")->required();
       app.add_option("--format", o->format, "hf: every slot written out")->capture_default_str();
       app.add_option("--dtype", o->dtype, "type written: keep, bf16, f16 or f32")->capture_default_str();
       app.add_option("--max-shard-gib", o->max_shard_gib, "largest file")->capture_default_str();
       app.add_flag("--force", o->job.force, "replace an existing output");
       app.add_flag("--allow-nonfinite", o->job.allow_nonfinite, "copy NaN and infinity instead of refusing");
       return [o] { run_export(*o); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
