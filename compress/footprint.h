#pragma once
// What a configuration or a compressed model will take, before anything is allocated: parameters, bytes stored and live, the peak of
// training, FLOPs of a token. For choosing a shape under a memory or compute budget, which is what joint scaling laws (arXiv
// 2502.05172) are used for; their fitted losses are not here: they belong to the data they were fitted on.
//   per token      2 FLOPs for each weight of a product that the token meets (projections, router, experts, adapters, LM head) and
//                  4 H Hd C for attention over C keys; norms, softmax and rotations are left out (below a percent)
//                  the products of a pass that do not depend on its tokens (mixed projections, model/latent_projections.h) are left out
//   experts met    the K slots of a token at their dearest: K different stored experts and K adapters, if there are as many
//   sections S     sectional MoE (arXiv 2503.20750, our reading): the hidden width is cut into S parts, each with one expert [F, D/S]
//                  that every token runs; no router. Planned, not run: the program has no such layer.

#include <vector>

#include "model/slot_table.h"
#include "model/training_estimate.h"

namespace lightmoe {

struct FootprintRequest {
  DType stored = DType::kBF16, live = DType::kBF16;
  int64_t context = 2048;    // keys that the token attends to
  int64_t train_tokens = 0;  // of a micro-batch; 0: no training
  bool train_experts_only = false;
  Recompute recompute = Recompute::kNone;
};
struct Footprint {
  int64_t parameters = 0, active_parameters = 0;
  int64_t stored_bytes = 0, live_bytes = 0;  // tensors on disk; weights in memory
  int64_t kv_bytes_per_token = 0;            // f32 keys and values of all layers
  int64_t flops_per_token = 0;               // forward
  TrainingEstimate training;                 // zero without training
};
// layers: empty for the stock shape.
Footprint plan_footprint(const OlmoeConfig& config, const std::vector<LayerShape>& layers,
                         const FootprintRequest& request);
// Sections S >= 1 that divide D. Error(kUsage).
Footprint plan_sections(const OlmoeConfig& config, int64_t sections, const FootprintRequest& request);

}  // namespace lightmoe
