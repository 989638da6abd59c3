#pragma once
// Choices at run time about which of a token's experts run. Nothing stored changes; without options the model is what it is.
//   top_k       experts per token instead of the config's num_experts_per_tok
//   skipping    a chosen slot e_k, k > 0, is not evaluated when  g_k < threshold[layer] * factor[layer](e_0, e_k) * g_0,
//               e_0 the token's first choice (NAEE, arXiv 2402.14800; with a factor DiEP, arXiv 2509.16105). Gates of those that are left are
//               as they were (OLMoE does not renormalise), or renormalised over them where norm_topk_prob.
//   buddies     with some experts of each layer resident only, who answers for the others (model/buddies.h); after skipping
//   unit_blocks how many blocks of units inside the chosen experts run (model/extension_moefication.cpp)
// Skipped choices get slot number E, which the MoE op drops (kernels/dispatch_plan.h). Inference only. Skipping and buddies are
// the host's: on a GPU the choices of a layer go there and back.

#include <cstdint>
#include <vector>

#include "model/buddies.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct RoutingCounts {
  int64_t chosen = 0, skipped = 0;     // (token, choice) pairs of all layers and passes
  ResidencyCounts residency;           // where buddies are asked for
  int64_t blocks = 0, blocks_run = 0;  // of units, of the choices that ran, where an extension runs blocks
};

struct RoutingOptions {
  int64_t top_k = 0;                             // 0 = the model's
  std::vector<double> skip_threshold;            // [L]; empty: nothing is skipped
  std::vector<std::vector<double>> skip_factor;  // [L] of [E*E]; empty: 1
  BuddyOptions buddies;
  int64_t unit_blocks = 0;          // blocks of units that a choice runs (extension moefication); 0 = all
  bool unit_oracle = false;         // picked by what they contribute instead of by the selector
  RoutingCounts* counts = nullptr;  // where choices are counted, if anywhere
};

// Experts per token of this run. Error(kUsage) unless 1 <= top_k <= `model_top_k`: the model has never mixed more.
int64_t experts_per_token(const RoutingOptions* options, int64_t model_top_k);
struct RoutedTokens {
  Tensor slots, gates;  // i32 [T,K], [T,K] f32 or f64, the largest first
};
// Counts `all` blocks, and `run` of them as run, for every choice that is not skipped.
void count_blocks(const RoutingOptions& options, const Tensor& slots, int64_t num_slots, int64_t run, int64_t all);
// What runs: skipping, then buddies. Counts.
RoutedTokens apply_routing(const RoutingOptions& options, int layer, int64_t num_slots, bool renormalize,
                           const RoutedTokens& routed);
// Counts, and replaces skipped slots by `num_slots` in a copy. Choices on the CPU.
RoutedTokens apply_skipping(const RoutingOptions& options, int layer, int64_t num_slots, bool renormalize,
                            const RoutedTokens& routed);

}  // namespace lightmoe
