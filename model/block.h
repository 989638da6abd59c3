#pragma once
// One transformer block of OLMoE, as two halves on a tape (equations in model/olmoe.h). With a tape that does not record this is
// inference; with a cache the keys and values of the new tokens are appended to it first and queries see all of it.

#include "autograd/ops.h"
#include "model/olmoe.h"

namespace lightmoe {

struct BlockContext {
  const OlmoeConfig& config;
  Tensor positions;              // i32 [T]
  AttentionSequences sequences;  // key rows: of the cache if there is one, else of the batch
  GemmCompute compute = GemmCompute::kF32;
  int layer = 0;
  KvCache* cache = nullptr;
  Tensor cache_rows;  // with a cache: i32 [T], the cache's row that each new token takes
  const Observer* observer = nullptr;
  const RoutingOptions* routing = nullptr;  // inference
  // Weights to learn, one [E] per layer: every slot runs for every token, with these in place of the router's gates (compress/diep.cpp).
  const std::vector<ParameterPtr>* slot_weights = nullptr;
};

// The residual stream between two halves: x + branch, which the next norm adds up in its own pass (and writes over branch).
// branch may be empty.
struct Residual {
  Var x, branch;
};
// branch: attention. Tells the observer the block's input.
Residual attention_half(Tape& tape, Residual in, const Block& block, const BlockContext& context);

struct MoeHalf {
  Residual out;  // branch: experts
  Routing routing;
  Var open;  // blocks of units (model/moe_extension.h), undefined where there are none
};
MoeHalf moe_half(Tape& tape, Residual in, const Block& block, const BlockContext& context, Recompute recompute);
// The last norm, of the residual stream behind all blocks.
Var final_norm(Tape& tape, const Residual& in, const Olmoe& model);

// All blocks and the final norm, without gradients.
Tensor run_blocks(const Olmoe& model, const Tensor& ids, BlockContext context);

}  // namespace lightmoe
