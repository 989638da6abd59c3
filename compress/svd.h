#pragma once
// Best rank-R approximation of a matrix: W ~ B A with B = U sqrt(S), A = sqrt(S) V^T from the R largest singular values.
// shapes: w [m,n], b [m,R], a [R,n]; R beyond min(m,n) pads with zeros.  dtypes: w floating; b, a f64; computed in f64.
// Small matrices (min(m,n) <= 160): one-sided Jacobi (Hestenes 1958), exact to rounding. Larger: subspace iteration with R + 16
//   vectors, 8 rounds, then Jacobi on the projection (Halko, Martinsson, Tropp 2011, algorithm 4.4): the error of the
//   approximation is the optimum's to a few per mille even for flat spectra.
// Deterministic: the starting subspace comes from the seed.  cost: Jacobi about 30 m n min(m,n), iteration 40 m n (R + 16) FLOPs.

#include <cstdint>
#include <vector>

#include "runtime/tensor.h"

namespace lightmoe {

struct LowRank {
  Tensor b, a;
  std::vector<double> singular_values;  // the R largest, descending
};
LowRank best_low_rank(const Tensor& w, int64_t rank, uint64_t seed);

}  // namespace lightmoe
