#pragma once
// Tokens of sequences whose prompts are in the cache, one each a step, without the host in between: what a step reads (last tokens,
// positions, lengths, rows of the cache, draws made) lies on the device and is advanced there. Beside the CPU the first step runs as it is
// and is then recorded (runtime/device_graph.h); later steps are one replay each. The host reads the new tokens alone.

#include <memory>
#include <vector>

#include "kernels/sampling.h"
#include "model/olmoe.h"
#include "runtime/device_graph.h"

namespace lightmoe {

// How tokens are chosen from logits: ids below `allowed`.
struct TokenChoice {
  SamplingRule rule;
  int64_t allowed = 0;
};

struct DecodeSequence {
  int32_t row = 0;     // of the cache's sequences
  int32_t token = 0;   // to feed next
  int32_t stream = 0;  // of its draws
  int32_t draws = 0;   // made so far
};

// Tokens for the last rows of each sequence's `counts` rows of hidden (0: none), in the order of those with rows. The draws of the
// streams are counted in draws[i] of that order.
std::vector<int32_t> choose_tokens(const Olmoe& model, const Tensor& hidden, const std::vector<int32_t>& counts,
                                   const std::vector<int32_t>& streams, const std::vector<int32_t>& draws,
                                   const TokenChoice& choice, const ForwardOptions& options);

class DecodeLoop {
 public:
  // The cache, whose lengths are those of the sequences, must outlive the loop.
  DecodeLoop(const Olmoe& model, KvCache& cache, const std::vector<DecodeSequence>& sequences,
             const TokenChoice& choice, const ForwardOptions& options);
  // Feeds the last tokens, appends them to the cache, returns the new ones, -1 where the logits are not finite.
  std::vector<int32_t> step();
  bool recorded() const { return graph_ != nullptr; }

 private:
  void queue_step();

  const Olmoe& model_;
  KvCache& cache_;
  std::vector<int32_t> rows_;
  TokenChoice choice_;
  ForwardOptions options_;
  Tensor ids_, positions_, k_count_, cache_rows_, q_begin_, k_begin_, streams_, draws_, tokens_;
  int64_t steps_ = 0;
  std::unique_ptr<DeviceGraph> graph_;  // after the tensors it works on
};

}  // namespace lightmoe
