#include <fmt/core.h>

#include "cli/compression_flags.h"
#include "cli/verb.h"
#include "compress/model_merge.h"
#include "compress/text.h"

namespace lightmoe::cli {
namespace {

struct Options {
  ModelMergeJob job;
  std::string rule = "average", dtype = "keep";
};

void run_merge(Options& o) {
  o.job.rule = parse_merge_rule(o.rule);
  o.job.dtype = parse_output_dtype(o.dtype);
  const ModelMergeReport report = merge_models(o.job);
  fmt::print("wrote {}: {} tensors, {}, {} of {} models\n", o.job.output.string(), report.tensors,
             human_bytes(report.bytes), o.rule, o.job.models.size());
}

const RegisterVerb verb{
    {"merge", "Compression", "Fine-tuned models of one base into one: average, task vectors, TIES, DARE",
     "lightmoe merge olmoe-math olmoe-code --base OLMoE-1B-7B --rule ties --density 0.2 -o olmoe-both",
     [](Flags& app) -> VerbAction {
       auto o = std::make_shared<Options>();
       app.add_option("models", o->job.models, "model directories (stock OLMoE) of the same shape")->required();
       app.add_option("-o,--output", o->job.output, "directory to write")->required();
       app.add_option("--base", o->job.base, "the model they were fine-tuned from (task, ties, dare)");
       app.add_option("--rule", o->rule, "average, task, ties, dare")->capture_default_str();
       app.add_option("--weights", o->job.weights, "one per model (default 1 each; an average divides by their sum)");
       app.add_option("--scale", o->job.scale, "of the merged task vector")->capture_default_str();
       app.add_option("--density", o->job.density, "share of a task vector that ties and dare keep")
           ->capture_default_str();
       app.add_option("--seed", o->job.seed, "of dare's draw")->capture_default_str();
       app.add_option("--dtype", o->dtype, "type written: keep, bf16, f16 or f32")->capture_default_str();
       app.add_flag("--force", o->job.force, "replace an existing output");
       app.add_flag("--allow-nonfinite", o->job.allow_nonfinite, "merge NaN and infinity instead of refusing");
       return [o] { run_merge(*o); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
