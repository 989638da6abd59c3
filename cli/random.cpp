#include <fmt/core.h>

#include <memory>

#include "cli/percent.h"
#include "cli/verb.h"
#include "loaders/output.h"
#include "model/random_weights.h"
#include "runtime/error.h"

namespace lightmoe::cli {
namespace {

struct Options {
  std::string shape, output, dtype = "bf16";
  uint64_t seed = 1;
  double shard_gib = 5;
  bool force = false;
};

// A known shape, a config.json, or a directory that has one.
OlmoeConfig config_of(const std::string& shape) {
  if (const auto named = named_config(shape)) return *named;
  if (std::filesystem::is_directory(shape)) return read_config(shape);
  check(std::filesystem::exists(shape), ErrorKind::kUsage,
        "{}: neither a known shape (tiny, mid, olmoe-1b-7b) nor a file", shape);
  return parse_config(read_file(shape, int64_t{16} << 20), shape);
}

void random(const Options& options) {
  check(options.dtype == "bf16" || options.dtype == "f32", ErrorKind::kUsage, "--dtype {}: expected bf16 or f32",
        options.dtype);
  check(options.shard_gib > 0 && options.shard_gib <= 1 << 20, ErrorKind::kUsage,
        "--max-shard-gib {}: expected above 0", options.shard_gib);
  const OlmoeConfig config = config_of(options.shape);
  OutputDirectory output(options.output, options.force, {options.shape});
  const DType dtype = options.dtype == "bf16" ? DType::kBF16 : DType::kF32;
  write_random_model(config, dtype, options.seed, output.path(), static_cast<int64_t>(options.shard_gib * (1 << 30)),
                     percent_on_terminal("random"));
  output.commit();
  fmt::print("{}: random weights, {}, seed {}\n", output.target().string(), options.dtype, options.seed);
}

const RegisterVerb verb{
    {"random", "Models", "Write a random checkpoint of a given shape, streaming",
     "lightmoe random tiny -o /tmp/tiny --dtype bf16 --seed 1", [](Flags& app) -> VerbAction {
       auto options = std::make_shared<Options>();
       app.add_option("shape", options->shape, "tiny, mid, olmoe-1b-7b, or a config.json")->required();
       app.add_option("-o,--output", options->output, "directory to write")->required();
       app.add_option("--dtype", options->dtype, "bf16 or f32")->capture_default_str();
       app.add_option("--seed", options->seed, "seed of the weights")->capture_default_str();
       app.add_option("--max-shard-gib", options->shard_gib, "split files over this size")->capture_default_str();
       app.add_flag("--force", options->force, "replace an output of this program");
       return [options] { random(*options); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
