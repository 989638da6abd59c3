#pragma once
// What every CPU backend of gemm.h works on: dense and grouped products as one list of plain ones, after the checks.
// Groups that are skipped are left out, groups that share their C in GroupedGemmK are one problem over all their rows.
// Each problem owns its part of C, so they may run in any order and at the same time.

#include <vector>

#include "kernels/gemm.h"

namespace lightmoe {

// op(X)[i,j] is stored at row i, column j (transposed: row j, column i); stored row r starts at
// element (rows ? rows[r] : r) * stride.
struct GemmMatrix {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t stride = 0;
  const int32_t* rows = nullptr;
  bool transposed = false;

  int64_t row_offset(int64_t r) const { return (rows != nullptr ? rows[r] : r) * stride; }
};

struct GemmProblem {
  GemmMatrix a, b;    // op(A) [m,k], op(B) [k,n]
  void* c = nullptr;  // null: an epilogue stores something else
  DType c_dtype = DType::kF32;
  int64_t c_stride = 0;
  int64_t m = 0, n = 0, k = 0;  // k may be 0: C = beta C
  int64_t first_row = 0;        // of the whole operation's rows, for epilogues
};

struct GemmProblems {
  std::vector<GemmProblem> items;
  double alpha = 1, beta = 0;
  GemmCompute compute = GemmCompute::kF32;
  GemmEpilogue epilogue = {};
  std::vector<std::vector<int32_t>> joined_rows;  // row lists of groups that share a C
};

GemmProblems problems_of(const Gemm& op);
GemmProblems problems_of(const GroupedGemmM& op);
GemmProblems problems_of(const GroupedGemmK& op);

}  // namespace lightmoe
