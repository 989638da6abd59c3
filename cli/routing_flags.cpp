#include "cli/routing_flags.h"

#include "compress/buddy_lists.h"
#include "compress/record.h"
#include "compress/skipping.h"
#include "compress/weights.h"
#include "loaders/json.h"
#include "model/moe_extension.h"

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
  app.add_option("--unit-blocks", f.unit_blocks,
                 "blocks of units that a chosen expert runs (of a model that split-units made; 0 = all)")
      ->group(group)
      ->capture_default_str();
  app.add_flag("--unit-oracle", f.unit_oracle, "pick them by what they contribute instead of by the model's selectors")
      ->group(group);
  app.add_option("--resident", f.resident, "experts of each layer in memory, the most used ones (0 = all)")
      ->group(group)
      ->capture_default_str();
  app.add_option("--resident-set", f.resident_set, "JSON file [[slot, ..], ..] that declares them, a list a layer")
      ->group(group);
  app.add_option("--buddies", f.buddy_statistics,
                 "statistics file whose token sample says who answers for experts that are not in memory (BuddyMoE)")
      ->group(group);
  app.add_option("--buddy-tau", f.buddy_tau, "share of an expert's co-activations that its list of buddies holds")
      ->group(group)
      ->capture_default_str();
  app.add_option("--buddy-max", f.buddies.max_substitutions, "buddies of a token in a layer; the rest is fetched")
      ->group(group)
      ->capture_default_str();
  app.add_option("--buddy-min-entropy", f.buddies.min_entropy,
                 "no buddies for tokens whose gates have less entropy than this, as a share of ln K")
      ->group(group)
      ->capture_default_str();
  app.add_option("--buddy-max-share", f.buddies.max_share, "no buddy for choices with more of the token's gates")
      ->group(group)
      ->capture_default_str();
}

namespace {

// Statistics of the model in `directory`, or of the one it was compressed from.
Statistics statistics_for(const std::string& file, const std::filesystem::path& directory, const OlmoeConfig& c) {
  const Statistics statistics = load_statistics(file);
  const bool compressed = std::filesystem::exists(directory / kRecordFile);
  const std::string original = compressed ? read_record(directory).model : model_fingerprint(Checkpoint(directory));
  check_statistics(statistics, original, c.num_layers, c.num_experts, c.hidden_size, file);
  return statistics;
}

bool runs_blocks(const Olmoe& model) {
  const auto& extension = model.blocks.front().moe.extension;
  return extension != nullptr && find_extension(extension->shape().kind).runs_blocks;
}

double percent_of(int64_t part, int64_t all) {
  return all > 0 ? 100.0 * static_cast<double>(part) / static_cast<double>(all) : 0;
}

}  // namespace

RunRouting::RunRouting(const RoutingFlags& f, const std::filesystem::path& directory, const Olmoe& model)
    : flags_(f),
      any_(f.experts_per_token != 0 || !f.skip_statistics.empty() || f.has_residency() || runs_blocks(model)) {
  check((f.unit_blocks == 0 && !f.unit_oracle) || runs_blocks(model), ErrorKind::kUsage,
        "--unit-blocks: the model's experts are not in blocks (split-units makes such a model)");
  check(!f.unit_oracle || f.unit_blocks > 0, ErrorKind::kUsage, "--unit-oracle needs --unit-blocks");
  options_.unit_blocks = f.unit_blocks, options_.unit_oracle = f.unit_oracle;
  check(!f.skip_by_likeness || !f.skip_statistics.empty(), ErrorKind::kUsage,
        "--skip-by-likeness needs --skip-experts with the statistics");
  options_.top_k = f.experts_per_token;
  experts_per_token(&options_, model.config.num_experts_per_token);  // refuses what is out of range
  options_.counts = &counts_;
  if (f.has_residency()) use_buddies(directory, model);
  if (f.skip_statistics.empty()) return;
  const Statistics statistics = statistics_for(f.skip_statistics, directory, model.config);
  options_.skip_threshold = skip_thresholds(statistics, model, f.skip_quantile);
  if (f.skip_by_likeness) options_.skip_factor = skip_factors(statistics, model);
}

void RunRouting::use_buddies(const std::filesystem::path& directory, const Olmoe& model) {
  const RoutingFlags& f = flags_;
  check(!f.buddy_statistics.empty(), ErrorKind::kUsage,
        "--resident and --resident-set need --buddies with the statistics that buddies come from");
  check(f.resident == 0 || f.resident_set.empty(), ErrorKind::kUsage, "give either --resident or --resident-set");
  const BuddyOptions& b = f.buddies;
  check(
      b.max_substitutions >= 0 && b.min_entropy >= 0 && b.min_entropy <= 1 && b.max_share >= 0 && b.max_share <= 1,
      ErrorKind::kUsage,
      "--buddy-max {} --buddy-min-entropy {:g} --buddy-max-share {:g}: expected 0 or more, and two shares from 0 to 1",
      b.max_substitutions, b.min_entropy, b.max_share);
  const OlmoeConfig& c = model.config;
  const Statistics statistics = statistics_for(f.buddy_statistics, directory, c);
  const ResidentSet set = f.resident_set.empty() ? ResidentSet{.most_used = f.resident, .declared = {}}
                                                 : read_resident_set(f.resident_set, c.num_layers, c.num_experts);
  options_.buddies = b;
  options_.buddies.layers = buddy_layers(statistics, model, set, f.buddy_tau);
}

std::string RunRouting::summary() const {
  if (!any_) return "";
  std::string text = fmt::format("of {} choices of experts {} were skipped ({:.1f} %)\n", counts_.chosen,
                                 counts_.skipped, percent_of(counts_.skipped, counts_.chosen));
  if (counts_.blocks > 0) {
    text += fmt::format("of {} blocks of units {} ran ({:.1f} %)\n", counts_.blocks, counts_.blocks_run,
                        percent_of(counts_.blocks_run, counts_.blocks));
  }
  const ResidencyCounts& r = counts_.residency;
  const int64_t all = r.resident + r.substituted + r.fetched;
  if (all == 0) return text;
  return text +
         fmt::format(
             "residency: {:.1f} % of {} choices were in memory, {:.1f} % ran on a buddy, {:.1f} % were fetched\n",
             percent_of(r.resident, all), all, percent_of(r.substituted, all), percent_of(r.fetched, all));
}

Json RunRouting::report() const {
  Json json;
  const RoutingFlags& f = flags_;
  if (!f.skip_statistics.empty()) {
    json["skip"] = {{"statistics", f.skip_statistics},
                    {"quantile", f.skip_quantile},
                    {"by_likeness", f.skip_by_likeness},
                    {"chosen", counts_.chosen},
                    {"skipped", counts_.skipped}};
  }
  if (counts_.blocks > 0) {
    json["unit_blocks"] = {{"run_of_an_expert", f.unit_blocks},
                           {"oracle", f.unit_oracle},
                           {"blocks", counts_.blocks},
                           {"run", counts_.blocks_run}};
  }
  if (f.has_residency()) {
    json["residency"] = {{"statistics", f.buddy_statistics},
                         {"resident", f.resident_set.empty() ? Json(f.resident) : Json(f.resident_set)},
                         {"tau", f.buddy_tau},
                         {"max_substitutions", f.buddies.max_substitutions},
                         {"min_entropy", f.buddies.min_entropy},
                         {"max_share", f.buddies.max_share},
                         {"in_memory", counts_.residency.resident},
                         {"substituted", counts_.residency.substituted},
                         {"fetched", counts_.residency.fetched}};
  }
  return json;
}

}  // namespace lightmoe::cli
