#include "cli/compression_flags.h"

namespace lightmoe::cli {

void add_compression_flags(Flags& app, CompressionFlags& f) {
  std::string names;
  for (const Method& method : methods()) names += (names.empty() ? "" : ", ") + method.name;
  const char* budget = "Budget (one of)";
  app.add_option("--method", f.method, names)->group("Method")->capture_default_str();
  app.add_option("--ratio", f.ratio, "share to remove, 0.5 halves the model (default 0.5)")->group(budget);
  app.add_option("--ratio-of", f.ratio_of, "what --ratio counts: model or experts")
      ->group(budget)
      ->capture_default_str();
  app.add_option("--target-gib", f.gib, "size of the weights to reach, GiB")->group(budget);
  app.add_option("--experts-per-layer", f.experts_per_layer, "experts stored per layer on average, bases included")
      ->group(budget);
  MethodOptions& o = f.options;
  const char* group = "Method";
  app.add_option("--bases", o.bases, "shared bases per layer, M")->group(group)->capture_default_str();
  app.add_option("--rank", o.rank, "rank of LightMoE's adapters, R")->group(group)->capture_default_str();
  app.add_option("--method-rank", o.method_rank, "rank of this method (0: as many trainable parameters as LightMoE)")
      ->group(group)
      ->capture_default_str();
  app.add_option("--selection", f.selection,
                 "adaptive (a threshold per layer), average (one threshold), uniform (one number)")
      ->group(group)
      ->capture_default_str();
  app.add_option("--alpha", o.selection.alpha, "how strongly router norms move the thresholds")
      ->group(group)
      ->capture_default_str();
  app.add_option("--clip", o.selection.clip, "largest move of a threshold, as a share")
      ->group(group)
      ->capture_default_str();
  app.add_option("--starved", f.starved, "experts without calibration tokens: unimportant, keep or error")
      ->group(group)
      ->capture_default_str();
  app.add_flag(
         "--redirect", o.redirect,
         "pruning: a removed slot answers with the survivor most like it (its gate adds up), instead of being masked")
      ->group(group);
  app.add_flag("--refit", o.refit,
               "merging: fit the down matrices of merged experts to what their members say (needs a sample of inputs)")
      ->group(group);
  app.add_option(
         "--importance", f.importance,
         "what makes an expert important: gate (the paper), reap (mean gate times output norm), taylor (gradients)")
      ->group(group)
      ->capture_default_str();
  app.add_flag("--align", o.align,
               "permute hidden units of a base's members to its dominant's before the mean (not in the paper)")
      ->group(group);
  app.add_option("--rank-allocation", f.rank_allocation,
                 "equal, or energy: the same sum of ranks where most of what the bases miss is kept (not in the paper)")
      ->group(group)
      ->capture_default_str();
  app.add_option(
         "--adapter-init", f.adapter_init,
         "gaussian (B = 0), svd of original - base, svd-whitened for the inputs that occur (both not in the paper)")
      ->group(group)
      ->capture_default_str();
  app.add_option("--latent-size", o.latent.size,
                 "molae, mobe, slbf: size M of the latent space (0: what the budget allows)")
      ->group(group)
      ->capture_default_str();
  app.add_option("--latent-group", o.latent.group, "molae: experts that share a projection")
      ->group(group)
      ->capture_default_str();
  app.add_option("--latent-bases", o.latent.bases,
                 "mobe, slbf: projections that are mixed (0: a quarter of the experts, as many as experts)")
      ->group(group)
      ->capture_default_str();
  app.add_flag("--latent-down", o.latent.down, "molae, mobe: factorise the down matrices too (slbf always does)")
      ->group(group);
  app.add_option("--fit-steps", o.latent.fit_steps, "mobe, slbf: steps of the fit to the weights (0: 2000)")
      ->group(group)
      ->capture_default_str();
  app.add_option("--adapter-std", o.adapter_std, "standard deviation of A (0: 1/sqrt(3 in))")
      ->group(group)
      ->capture_default_str();
  app.add_option("--seed", o.seed, "of the adapters' first values")->group(group)->capture_default_str();
}

MethodOptions method_options(const CompressionFlags& f) {
  MethodOptions o = f.options;
  check(f.ratio.has_value() + f.gib.has_value() + f.experts_per_layer.has_value() <= 1, ErrorKind::kUsage,
        "--ratio, --target-gib and --experts-per-layer exclude each other");
  check(f.ratio_of == "model" || f.ratio_of == "experts", ErrorKind::kUsage, "--ratio-of {}: expected model or experts",
        f.ratio_of);
  check(o.bases >= 1 && o.rank >= 1 && o.method_rank >= 0 && o.adapter_std >= 0, ErrorKind::kUsage,
        "--bases {} --rank {} --method-rank {} --adapter-std {:g}: expected positive numbers", o.bases, o.rank,
        o.method_rank, o.adapter_std);
  check(o.latent.size >= 0 && o.latent.group >= 1 && o.latent.bases >= 0 && o.latent.fit_steps >= 0, ErrorKind::kUsage,
        "--latent-size {} --latent-group {} --latent-bases {} --fit-steps {}: expected numbers from 0, a group from 1",
        o.latent.size, o.latent.group, o.latent.bases, o.latent.fit_steps);
  o.budget.kind = f.ratio_of == "experts" ? BudgetKind::kExperts : BudgetKind::kWholeModel;
  if (f.ratio) o.budget.value = *f.ratio;
  if (f.gib) o.budget = {BudgetKind::kGib, *f.gib};
  if (f.experts_per_layer) o.budget = {BudgetKind::kExpertsPerLayer, static_cast<double>(*f.experts_per_layer)};
  o.selection.rule = parse_selection_rule(f.selection);
  o.selection.starved = parse_starved_policy(f.starved);
  o.adapter_init = parse_adapter_init(f.adapter_init);
  o.selection.importance = parse_importance(f.importance);
  o.rank_allocation = parse_rank_allocation(f.rank_allocation);
  return o;
}

std::optional<DType> parse_output_dtype(const std::string& name) {
  if (name == "keep") return std::nullopt;
  if (name == "bf16") return DType::kBF16;
  if (name == "f16") return DType::kF16;
  if (name == "f32") return DType::kF32;
  fail(ErrorKind::kUsage, "--dtype {}: expected keep, bf16, f16 or f32", name);
}

}  // namespace lightmoe::cli
