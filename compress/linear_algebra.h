#pragma once
// Small dense linear algebra in f64 for methods that refit or factorise. Matrices are tensors [rows, columns] f64.
// Plain algorithms, deterministic, one thread except the products: at OLMoE's D = 2048 an eigen-decomposition takes minutes.

#include <vector>

#include "runtime/tensor.h"

namespace lightmoe {

// op(A) op(B).
Tensor product(const Tensor& a, bool trans_a, const Tensor& b, bool trans_b);
Tensor transpose(const Tensor& a);

// a [n,n] symmetric positive definite = L L^T; returns L, zeros above. Error(kNumeric) when a pivot is not positive.
Tensor cholesky(const Tensor& a);
// x = a^{-1} b for a = L L^T, b [n,m].
Tensor cholesky_solve(const Tensor& l, const Tensor& b);
// x L^T = b, that is x = b L^{-T}, b [m,n]; with trans: x L = b, x = b L^{-1}.
Tensor solve_right(const Tensor& l, const Tensor& b, bool trans);
// a + ridge * mean of the diagonal on the diagonal; an all-zero matrix becomes the identity.
Tensor with_ridge(const Tensor& a, double ridge);

// a [n,n] symmetric = V^T diag(values) V with values descending and eigenvectors as ROWS of V. Householder tridiagonalisation, then
// implicit QL (Martin, Reinsch, Wilkinson 1968): about 9 n^3 FLOPs.
struct Eigen {
  std::vector<double> values;
  Tensor vectors;
};
Eigen symmetric_eigen(const Tensor& a);

}  // namespace lightmoe
