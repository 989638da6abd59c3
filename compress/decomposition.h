#pragma once
// A merged expert as low rank plus structured-sparse (MC-SMoE, arXiv 2310.01334): every matrix W = B A + S with B A its best rank-R
// approximation; of S only some hidden units stay, those where most is missing:
//   || S_gate[u,:] ||^2 + || S_up[u,:] ||^2 + || S_down[:,u] ||^2,  the largest first, ties to the lower unit
// Units stand in that order in everything, so that the first so many of S are what is kept; the function is the same in any order.
// f64; units the dropped S would have had are B A alone.

#include "compress/merging.h"
#include "compress/svd.h"

namespace lightmoe {

struct Decomposition {
  ExpertMatrices sparse;       // S, all units: gate, up [F,D], down [D,F]
  LowRank gate, up, down;      // B [F,R] A [R,D]; of down B [D,R] A [R,F]
  std::vector<int32_t> order;  // unit of the merged expert at each place
};
// group: what the expert is made of, aligned and averaged (compress/merging.h); a single expert is itself.
Decomposition decompose(const MethodInput& input, int64_t layer, const BankEntry& group, int64_t rank);
// The same units alone, the first `units` of a matrix: rows of gate and up, columns of down.
Tensor first_units(const Tensor& w, ExpertMatrix matrix, int64_t units);

}  // namespace lightmoe
