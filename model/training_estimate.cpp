#include "model/training_estimate.h"

#include <algorithm>

#include "model/moe_op.h"
#include "model/progress.h"
#include "runtime/device_room.h"

namespace lightmoe {
namespace {

constexpr int64_t kLogitChunkBytes = int64_t{64} << 20;  // kernels/cross_entropy.h

}  // namespace

TrainingEstimate estimate_training(const OlmoeConfig& config, const std::vector<ParameterPtr>& parameters,
                                   int64_t tokens, Recompute recompute, const StepExecution& execution) {
  const int64_t d = config.hidden_size, kv = config.num_kv_heads * config.head_dim();
  const int64_t k = config.num_experts_per_token, f = config.intermediate_size;
  const int64_t attention = 4 * d + 2 * kv + config.num_heads;  // x, the middle, q and out; k, v (norms are made again)
  const int64_t router = config.num_experts + 2 * k;
  // Of the experts, in values of 4 bytes: h, and the plan's lists.
  const int64_t row_bytes = execution.fused && execution.compute == GemmCompute::kBF16 ? 2 : 4;
  const int64_t experts = 2 * k * f * row_bytes / 4 + 7 * k;
  const int64_t layer = attention + router + experts;
  // Backward of the experts holds a, da and ds or rows of D, beside n, dy and dx; that of attention twice q, k, v and their
  // gradients.
  // Fused, dh, s, ds and rows of D; and x and dy in the rows' type.
  const int64_t of_experts = execution.fused ? (k * (4 * f + d) + 2 * d) * row_bytes / 4 : k * (2 * f + std::max(f, d));
  const int64_t working = std::max(of_experts + 3 * d, 5 * d + 4 * kv);
  // Kept when the loss is computed, and when a layer's backward has made again what was not.
  int64_t kept = config.num_layers * layer, again = 0;
  if (recompute == Recompute::kMoe) kept = config.num_layers * (attention + router), again = experts;
  if (recompute == Recompute::kBlock) kept = config.num_layers * d, again = layer;
  const int64_t bytes_per_value = 4;
  TrainingEstimate estimate{.fixed = training_memory(parameters)};
  const int64_t logits = std::min(kLogitChunkBytes, bytes_per_value * tokens * config.vocab_size);
  estimate.activation_bytes =
      bytes_per_value * tokens * (kept + d) + std::max(bytes_per_value * tokens * (again + working), logits);
  return estimate;
}

StepExecution StepExecution::of_this_process(GemmCompute compute) {
  const MoeFusion fused = moe_execution().fused;
  const bool device = default_device() != DeviceKind::kCpu;
  return {.compute = compute, .fused = fused == MoeFusion::kOn || (fused == MoeFusion::kAutomatic && device)};
}

void require_room_for_training(const TrainingEstimate& estimate, int64_t live_bytes, int64_t other_bytes) {
  const TrainingMemory& m = estimate.fixed;
  const int64_t activations = estimate.activation_bytes * 4 / 5;
  require_device_room(m.total_bytes() + activations + other_bytes - live_bytes,
                      fmt::format("a training step (weights {}, gradients {}, optimizer {}, activations {})",
                                  format_bytes(m.weight_bytes), format_bytes(m.gradient_bytes),
                                  format_bytes(m.optimizer_bytes), format_bytes(estimate.activation_bytes)),
                      "use fewer --batch-rows, a smaller --length, or --recompute block");
}

std::string to_text(const TrainingEstimate& estimate) {
  const TrainingMemory& m = estimate.fixed;
  std::string text = fmt::format("parameters      {} ({} train)\n", m.parameters, m.trainable);
  const auto line = [&](const char* name, int64_t bytes) {
    text += fmt::format("{:<16}{}\n", name, format_bytes(bytes));
  };
  line("weights", m.weight_bytes);
  line("gradients", m.gradient_bytes);
  line("optimizer", m.optimizer_bytes);
  line("activations", estimate.activation_bytes);
  line("together about", estimate.total_bytes());
  return text;
}

}  // namespace lightmoe
