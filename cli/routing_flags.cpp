#include "cli/routing_flags.h"

#include "compress/record.h"
#include "compress/skipping.h"
#include "compress/weights.h"

namespace lightmoe::cli {

void add_routing_flags(Flags& app, RoutingFlags& f) {
  const char* group = "Routing";
  app.add_option("--experts-per-token", f.experts_per_token, "experts a token runs (0 = num_experts_per_tok)")
      ->group(group)
      ->capture_default_str();
  app.add_option(
         "--skip-experts", f.skip_statistics,
         "skip choices whose gate is small beside the token's largest: statistics file with the token sample that "
         "sets each layer's threshold")
      ->group(group);
  app.add_option("--skip-quantile", f.skip_quantile, "share of the sample's lower choices below the threshold")
      ->group(group)
      ->capture_default_str();
  app.add_flag("--skip-by-likeness", f.skip_by_likeness,
               "skip the more the more an expert's outputs are like those of the token's first (DiEP)")
      ->group(group);
}

RunRouting::RunRouting(const RoutingFlags& f, const std::filesystem::path& directory, const Olmoe& model)
    : any_(f.experts_per_token != 0 || !f.skip_statistics.empty()) {
  check(!f.skip_by_likeness || !f.skip_statistics.empty(), ErrorKind::kUsage,
        "--skip-by-likeness needs --skip-experts with the statistics");
  options_.top_k = f.experts_per_token;
  experts_per_token(&options_, model.config.num_experts_per_token);  // refuses what is out of range
  options_.counts = &counts_;
  if (f.skip_statistics.empty()) return;
  const Statistics statistics = load_statistics(f.skip_statistics);
  const bool compressed = std::filesystem::exists(directory / kRecordFile);
  const std::string original = compressed ? read_record(directory).model : model_fingerprint(Checkpoint(directory));
  const OlmoeConfig& c = model.config;
  check_statistics(statistics, original, c.num_layers, c.num_experts, c.hidden_size, f.skip_statistics);
  options_.skip_threshold = skip_thresholds(statistics, model, f.skip_quantile);
  if (f.skip_by_likeness) options_.skip_factor = skip_factors(statistics, model);
}

std::string RunRouting::summary() const {
  if (!any_) return "";
  const double share =
      counts_.chosen > 0 ? 100.0 * static_cast<double>(counts_.skipped) / static_cast<double>(counts_.chosen) : 0;
  return fmt::format("of {} choices of experts {} were skipped ({:.1f} %)", counts_.chosen, counts_.skipped, share);
}

}  // namespace lightmoe::cli
