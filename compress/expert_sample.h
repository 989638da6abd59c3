#pragma once
// Original experts read whole, and what they compute on the calibration's token sample.
// NOTE: memory is that of one or a few experts and of the sample's rows, never of a layer's 64 experts.

#include "compress/plan.h"
#include "compress/registry.h"

namespace lightmoe {

ExpertMatrices read_expert(const ExpertSource& experts, int64_t layer, int64_t expert, DType dtype = DType::kF32);

// On rows x [n,D] of the matrices' type: hidden [n,F] = silu(x Wg^T) * (x Wu^T);  output [n,D] = hidden Wd^T.
Tensor expert_hidden(const ExpertMatrices& expert, const Tensor& x);
Tensor expert_output(const ExpertMatrices& expert, const Tensor& hidden);

// The sample as one layer's router saw it: softmax over all slots, the K largest, renormalised only if the model does.
struct LayerSample {
  Tensor x;                    // [N,D] f32
  std::vector<double> probs;   // [N*E]
  std::vector<int32_t> slots;  // [N*K]
  std::vector<double> gates;   // [N*K]
  int64_t tokens() const { return x.dim(0); }
};
// At most `limit` tokens, evenly spaced (0 = all).
LayerSample layer_sample(const MethodInput& input, int64_t layer, int64_t limit = 0);
// Rows of x of the tokens that chose one of these slots.
Tensor routed_rows(const LayerSample& sample, const std::vector<int32_t>& slots);

// <W_i, W_j> over one kind of matrix for a list of (layer, expert), [n*n]; read in blocks of rows, summed in f64.
struct ExpertId {
  int64_t layer, expert;
};
std::vector<double> expert_products(const ExpertSource& experts, const OlmoeConfig& config,
                                    const std::vector<ExpertId>& list, ExpertMatrix matrix);

}  // namespace lightmoe
