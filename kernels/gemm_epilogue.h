#pragma once
// The epilogues of gemm.h for CPU backends, a row of the product at a time.

#include "kernels/gemm_problem.h"

namespace lightmoe {

// Writes what the epilogue makes of row i of the problem, values [n] being alpha times its sums. Not for kNone.
void finish_row(const GemmProblems& all, const GemmProblem& p, int64_t i, const float* values);
void finish_row(const GemmProblems& all, const GemmProblem& p, int64_t i, const double* values);

}  // namespace lightmoe
