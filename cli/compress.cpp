#include "compress/compressor.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "cli/compression_flags.h"
#include "cli/verb.h"
#include "compress/text.h"

namespace lightmoe::cli {
namespace {

struct Options {
  CompressJob job;
  CompressionFlags flags;
  std::string dtype = "keep";
  double max_shard_gib = 5;
  bool dry_run = false, list = false;
};

// One line per method, columns as wide as their widest cell and two spaces apart.
void list_methods() {
  std::vector<std::array<std::string, 6>> lines = {
      {"method", "slots", "training", "reads beside the weights", "arXiv", "what it does"}};
  for (const Method& m : methods()) {
    const char* training = m.train_free ? "train-free" : m.trainable == Trainable::kNothing ? "none" : "trained";
    lines.push_back({m.name, m.slots.empty() ? "-" : m.slots, training, name_of(m.needs),
                     m.paper.empty() ? "-" : m.paper, m.summary});
  }
  std::array<size_t, 5> widths{};
  for (const auto& line : lines) {
    for (size_t i = 0; i < widths.size(); ++i) widths[i] = std::max(widths[i], line[i].size() + 2);
  }
  for (const auto& line : lines) {
    for (size_t i = 0; i < widths.size(); ++i) fmt::print("{:<{}}", line[i], widths[i]);
    fmt::print("{}\n", line.back());
  }
}

void compress(Options& o) {
  if (o.list) return list_methods();
  check(!o.job.model.empty(), ErrorKind::kUsage, "a model directory is missing (or --list)");
  o.job.options = method_options(o.flags);
  o.job.method = o.flags.method;
  o.job.dtype = parse_output_dtype(o.dtype);
  check(o.max_shard_gib > 0, ErrorKind::kUsage, "--max-shard-gib {:g}: expected a positive number", o.max_shard_gib);
  o.job.max_shard_bytes = std::llround(o.max_shard_gib * 0x1p30);
  o.job.say = [](const std::string& line) { fmt::print(stderr, "{}\n", line); };
  if (o.dry_run) {
    fmt::print("{}", describe(estimate_compression(o.job)));
    return;
  }
  check(!o.job.output.empty(), ErrorKind::kUsage, "-o DIR is missing (or --dry-run)");
  const CompressionRecord record = compress_model(o.job);
  fmt::print("{}", describe(CompressEstimate{.record = record}));
  const Coverage& c = record.coverage;
  fmt::print("tensors      {} read: {} copied, {} mixed into bases, {} dropped, {} skipped\n", c.seen, c.copied,
             c.changed, c.dropped, c.skipped.size());
  fmt::print("peak RSS     {}\n", human_bytes(process_peak_rss_bytes()));
  fmt::print("wrote        {}\n", o.job.output.string());
}

const RegisterVerb verb{
    {"compress", "Compression", "Replace the least important experts: a smaller model directory",
     "lightmoe compress OLMoE-1B-7B --stats math.safetensors --ratio 0.5 -o olmoe-math-50",
     [](Flags& app) -> VerbAction {
       auto o = std::make_shared<Options>();
       app.add_option("model", o->job.model, "original model directory");
       app.add_flag("--list", o->list, "every method on one line, and nothing else");
       app.add_option("-o,--output", o->job.output, "directory to write");
       app.add_option("--stats", o->job.statistics,
                      "statistics file of `calibrate`; without it every expert counts the same");
       add_compression_flags(app, o->flags);
       app.add_option("--dtype", o->dtype, "type written: keep, bf16, f16 or f32")
           ->group("Output")
           ->capture_default_str();
       app.add_option("--max-shard-gib", o->max_shard_gib, "largest file")->group("Output")->capture_default_str();
       app.add_flag("--force", o->job.force, "replace an existing output")->group("Output");
       app.add_flag("--allow-nonfinite", o->job.allow_nonfinite, "copy NaN and infinity instead of refusing")
           ->group("Output");
       app.add_flag("--dry-run", o->dry_run, "say what it will cost, write nothing")->group("Output");
       return [o] { compress(*o); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
