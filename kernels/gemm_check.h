#pragma once
// Holds a GEMM backend to the equations of gemm.h, on the default device, before it is trusted: ragged and aligned shapes, every
// transposition, types, scales, gathered rows, column windows, empty, skipped and one-row groups, one group with everything, and rows of
// NaN. What must not be read is NaN (C when beta = 0, rows and columns outside), what must not be written is guarded and compared bit by bit.
// Oracle: the `reference` backend in f64 on the CPU, on the same rounded factors. Tolerance, for each element:
//   |error| <= (k + 2) 2^-24 (|alpha| sum_k |a b| + |beta c|) + half a unit in the last place of C
// (and where several groups add to one C, a rounding of C after each of them), the bound of any order of k sums in f32; products of bf16 factors are exact in f32. A product in tf32 is outside it where k is small.
// Only what the backend's supports() takes is checked. A crash or more than 30 s in one product ends the process with one line and exit code 9.

#include <string>
#include <vector>

#include "kernels/gemm.h"

namespace lightmoe {

struct GemmCheckReport {
  int checked = 0, wrong = 0;
  std::string first_wrong;              // the product and what is wrong with it
  double largest_share = 0;             // largest error as a share of its tolerance, over right products
  std::vector<std::string> signatures;  // "dense nt f32xf32->f32: 24 products, 0 wrong"
};

// `name` stands in the line printed when the backend crashes.
GemmCheckReport check_gemm_backend(const GemmBackend& backend, const std::string& name);

}  // namespace lightmoe
