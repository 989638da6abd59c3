#pragma once
// How much the loss feels each unit inside the experts (the diagonal Fisher information of arXiv 2606.05538):
//   s_ej = sum over sequences of (1/D) sum_k (dL/dW_g)_jk^2 + (dL/dW_u)_jk^2 + (dL/dW_d)_kj^2
// and how much the loss would change, to first order, without an expert's contribution (its output is linear in W_d):
//   taylor_e = sum over sequences of |<W_d, dL/dW_d>|
// L is the mean cross-entropy of one sequence's labels. The published score divides by the number of sequences, which ranks the
// same; sums of several files add up. Sequences without a label count nothing.
// Memory: gradients of all experts in f32 while it runs, that is twice a bf16 model.

#include <vector>

#include "compress/statistics.h"
#include "model/olmoe.h"

namespace lightmoe {

// labels: of each token of a sequence the next one, or -100 (compress/calibrate.h).
// Adds to unit_gradient2 and taylor of every layer, which are made when they are empty. What is trainable in the model is restored afterwards.
// Error(kNumeric) on non-finite gradients.
void add_unit_gradients(const Olmoe& model, const std::vector<std::vector<int32_t>>& sequences,
                        const std::vector<std::vector<int32_t>>& labels, GemmCompute compute, Statistics& statistics);

}  // namespace lightmoe
