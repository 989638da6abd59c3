#include "model/training_estimate.h"

#include <algorithm>

#include "model/progress.h"

namespace lightmoe {
namespace {

constexpr int64_t kLogitChunkBytes = int64_t{64} << 20;  // kernels/cross_entropy.h

}  // namespace

TrainingEstimate estimate_training(const OlmoeConfig& config, const std::vector<ParameterPtr>& parameters,
                                   int64_t tokens, Recompute recompute) {
  const int64_t d = config.hidden_size, kv = config.num_kv_heads * config.head_dim();
  const int64_t k = config.num_experts_per_token, f = config.intermediate_size;
  const int64_t attention = 4 * d + 2 * kv + config.num_heads;  // x, the middle, q and out; k, v (norms are made again)
  const int64_t router = config.num_experts + 2 * k;
  const int64_t experts = 2 * k * f;
  const int64_t layer = attention + router + experts;
  // Backward of the experts holds a, da and ds or rows of D, beside n, dy and dx; that of attention twice q, k, v and their
  // gradients.
  const int64_t working = std::max(k * (2 * f + std::max(f, d)) + 3 * d, 5 * d + 4 * kv);
  int64_t kept = config.num_layers * layer;
  if (recompute == Recompute::kMoe) kept = config.num_layers * (attention + router) + experts;
  if (recompute == Recompute::kBlock) kept = config.num_layers * d + layer;
  const int64_t bytes_per_value = 4;
  TrainingEstimate estimate{.fixed = training_memory(parameters)};
  estimate.activation_bytes = bytes_per_value * tokens * (kept + working + d) +
                              std::min(kLogitChunkBytes, bytes_per_value * tokens * config.vocab_size);
  return estimate;
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
