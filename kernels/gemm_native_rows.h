#pragma once
// The path of the native GEMM for few rows (decoding): the weights [N,K] are read once, transposed in registers and used
// at once, nothing is packed. The same chain of additions as the tiles, hence the same bits.

#include "kernels/gemm_problem.h"

namespace lightmoe::native {

inline constexpr int64_t kFewRows = 6;

inline bool has_few_rows(const GemmProblem& p) { return p.m <= kFewRows && p.b.transposed && p.k > 0; }
// Columns [begin, end) of C.
void multiply_few_rows(const GemmProblem& p, const GemmProblems& all, int64_t begin, int64_t end);

}  // namespace lightmoe::native
