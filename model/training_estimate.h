#pragma once
// How much memory a training step will take, before anything is allocated (`train --dry-run`, and before every run on a device).

#include "autograd/optimizer.h"
#include "model/config.h"
#include "model/olmoe.h"

namespace lightmoe {

struct TrainingEstimate {
  TrainingMemory fixed;          // weights, gradients, moments: exact
  int64_t activation_bytes = 0;  // peak of one micro-batch; within about a fifth, for the stock layer
  int64_t total_bytes() const { return fixed.total_bytes() + activation_bytes; }
};
// What backward needs of T tokens: per layer the two residual rows, q and the attention's output (D each), k and v, the router's
// probabilities, 2 F K of expert hidden values; then the larger of one half-layer's working set in backward, with what it makes again,
// and a chunk of logits. fused: experts in fused kernels (model/moe_fused.h), whose rows are bf16 with bf16 products.
struct StepExecution {
  GemmCompute compute = GemmCompute::kF32;
  bool fused = false;
  static StepExecution of_this_process(GemmCompute compute);  // as the default device and moe_execution() say
};
TrainingEstimate estimate_training(const OlmoeConfig& config, const std::vector<ParameterPtr>& parameters,
                                   int64_t tokens, Recompute recompute, const StepExecution& execution = {});
// Throws Error(kMemory) where what is still to be allocated does not fit the device, activations taken a fifth lower than estimated.
// live_bytes of it are there already, other_bytes come besides.
void require_room_for_training(const TrainingEstimate& estimate, int64_t live_bytes, int64_t other_bytes = 0);
std::string to_text(const TrainingEstimate& estimate);  // lines for people

}  // namespace lightmoe
