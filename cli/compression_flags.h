#pragma once
// Every constant of the methods as a flag; shared by the verbs that plan a compression.

#include <optional>
#include <string>

#include "cli/flags.h"
#include "compress/registry.h"

namespace lightmoe::cli {

struct CompressionFlags {
  std::string method = "lightmoe";
  std::optional<double> ratio, gib;
  std::optional<int64_t> experts_per_layer;
  std::string ratio_of = "model";
  std::string selection = "adaptive", starved = "unimportant", adapter_init = "gaussian", importance = "gate",
              rank_allocation = "equal";
  MethodOptions options;
};
void add_compression_flags(Flags& app, CompressionFlags& flags);
MethodOptions method_options(const CompressionFlags& flags);  // Error(kUsage) on contradictions
// "keep" is nullopt.
std::optional<DType> parse_output_dtype(const std::string& name);

}  // namespace lightmoe::cli
