#pragma once
// How much memory a training step will take, before anything is allocated (`train --dry-run`).

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
// probabilities, 2 F K of expert hidden values; then the largest working set of one half-layer's backward and a chunk of logits.
TrainingEstimate estimate_training(const OlmoeConfig& config, const std::vector<ParameterPtr>& parameters,
                                   int64_t tokens, Recompute recompute);
std::string to_text(const TrainingEstimate& estimate);  // lines for people

}  // namespace lightmoe
