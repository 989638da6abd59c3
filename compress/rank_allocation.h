#pragma once
// The ranks of a plan's adapters, N R in all, where they keep most of what the bases miss of the experts. Not in the paper, which gives R
// to each. With s_ik the k-th singular value of expert minus base, summed over gate, up and down as squares, a rank k of slot i
// keeps s_ik^2; the largest N R of them over the whole model are taken, one at least and 4 R at most for each slot. Ties: lower layer,
// then lower slot. A rank costs the same everywhere, so the size does not change. Whitened singular values where the adapters start so.

#include "compress/plan.h"
#include "compress/registry.h"

namespace lightmoe {

void allocate_ranks(Plan& plan, const MethodInput& input, int64_t rank);

}  // namespace lightmoe
