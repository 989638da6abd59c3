#pragma once
// Units inside experts in blocks of one size, F / N units after each other, of which a choice may run some (MoEfication, DSMoE).
// What a block contributes to its expert's output is judged by  sum over its units j of |a_j| |W_d[:,j]|_2,  a = SwiGLU(h): the length of
// each unit's part of the output. (Published for ReLU networks: the sum of positive activations; SwiGLU's have signs.)

#include "kernels/gemm.h"
#include "model/moe.h"

namespace lightmoe {

// Of every choice, [T*K,N], the type of a; a [T*K,F] as unit_activations (model/moe_modulated.h) gives it.
Tensor block_contributions(const MoeLayer& layer, const Tensor& a, const Tensor& slots, int64_t blocks);
// 1 at the `keep` largest of each row (ties: the lower block), 0 elsewhere.
Tensor keep_largest(const Tensor& scores, int64_t keep);

}  // namespace lightmoe
