#pragma once
// Means over layers and counted tokens, as losses.
//   RouterEntropy  loss = mean over layers and counted tokens of -sum_e p_e ln p_e  (0 ln 0 = 0: removed slots count nothing)
//                  dprobs = scale * its gradient, -(ln p_e + 1) / (tokens * layers), where p_e > 0 and the token counts
//                  How unsure routers are; trained, they choose more surely (SEER-MoE, arXiv 2404.05089).
//   MaskedMean     loss = mean over the tensors of the mean over the elements of counted tokens; dx = scale * its gradient
// Where no token counts, the loss is 0. Gradients are '=' and 0 for tokens that do not count.
// shapes: one tensor a layer: probs [T,E], x [R,N] whose row r is of token r / (R / T); mask u8 [T], undefined = all rows count;
//   loss f64 [1] '='; dprobs, dx: none at all, or like their tensors, each defined or not.
// dtypes: f32/bf16/f64 (cpu), one type. Deterministic: sums in f64, in a fixed order. No aliasing.

#include <vector>

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct RouterEntropy {
  std::vector<Tensor> probs;
  Tensor mask;
  double scale = 1;
  Tensor loss;
  std::vector<Tensor> dprobs;
};
struct MaskedMean {
  std::vector<Tensor> x;
  Tensor mask;
  double scale = 1;
  Tensor loss;
  std::vector<Tensor> dx;
};
void run(const RouterEntropy& op);
void run(const MaskedMean& op);

}  // namespace lightmoe
