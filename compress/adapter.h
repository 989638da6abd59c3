#pragma once
// First values of a low-rank term B A, one matrix at a time: A [R,in], B [out,R], f32. A pure function of its arguments: the draw
// depends on (seed, layer, slot, matrix) alone.
//   gaussian  A ~ N(0, std^2), std 1 / sqrt(3 in) unless given: the variance of LoRA's customary start (Kaiming uniform with
//             a = sqrt 5 is uniform in +-1/sqrt(in)); the paper says "random Gaussian" without a number. B = 0.
//             Beside a base W = 0, B of gate and up ~ N(0, 1/R) (see compress/replace_none.cpp).
//   svd       B A = best rank-R approximation of original - base. Not in the paper.

#include "compress/registry.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct AdapterFactors {
  Tensor a, b;
};
struct AdapterSite {
  int64_t layer = 0, slot = 0;
  ExpertMatrix matrix = ExpertMatrix::kGate;
  int64_t out = 0, in = 0, rank = 0;
  bool zero_base = false;
};
AdapterFactors gaussian_factors(const AdapterSite& site, double stddev, uint64_t seed);
// residual [out,in] = original - base.
AdapterFactors svd_factors(const AdapterSite& site, const Tensor& residual, uint64_t seed);

}  // namespace lightmoe
