#pragma once
// Flags about which of a token's experts run (model/routing.h), for verbs over one model.

#include <filesystem>
#include <string>

#include "cli/flags.h"
#include "loaders/json_type.h"
#include "model/olmoe.h"

namespace lightmoe::cli {

struct RoutingFlags {
  int64_t experts_per_token = 0;  // 0 = the model's
  std::string skip_statistics;    // "" = nothing is skipped
  double skip_quantile = 0.5;
  bool skip_by_likeness = false;
  int64_t resident = 0;          // experts of a layer, 0 = all
  std::string resident_set;      // file that declares them instead
  std::string buddy_statistics;  // where buddies come from
  double buddy_tau = .95;
  BuddyOptions buddies;     // its conditions
  int64_t unit_blocks = 0;  // 0 = all
  bool unit_oracle = false;
  bool has_residency() const { return resident != 0 || !resident_set.empty(); }
};
void add_routing_flags(Flags& app, RoutingFlags& flags);

// The options, counting into itself.
class RunRouting {
 public:
  // Error(kInput) when the statistics are not of the model in `directory`, or of the one it was compressed from.
  RunRouting(const RoutingFlags& flags, const std::filesystem::path& directory, const Olmoe& model);
  RunRouting(const RunRouting&) = delete;
  RunRouting& operator=(const RunRouting&) = delete;
  const RoutingOptions* options() const { return any_ ? &options_ : nullptr; }
  std::string summary() const;  // "of 1600 choices of experts 400 were skipped (25.0 %)\n", a line for each that is on
  Json report() const;          // the same for a result file; null without options

 private:
  void use_buddies(const std::filesystem::path& directory, const Olmoe& model);
  RoutingFlags flags_;
  bool any_ = false;
  RoutingOptions options_;
  mutable RoutingCounts counts_;
};

}  // namespace lightmoe::cli
