#pragma once
// The row movements of an MoE layer.
//   GatedSum          s[v,:] = sum over pairs p of visit v (in pair order) gates[pair_index[p]] * a[p,:]     (before the down projection)
//   GatedSumBackward  da[p,:] = gates[pair_index[p]] * ds[v(p),:] (accumulate: '+=');  dgates[pair_index[p]] (+)= <ds[v(p),:], a[p,:]>
//   SumPairs          y[v,:] = sum over pairs p of visit v of x[p,:]                                          (dh of a shared base)
//   ExpandPairs       y[p,:] = x[pair_visit[p],:]                                                             (h0 to every slot of the base)
//   Combine           y[t,:] (=|+=) sum_j scale * x[index[t,j],:], index -1 skipped, in order of j; scale = scales[t,j] or 1
// shapes: a, da [P,F]; s, ds [V,F]; gates, dgates [T,K] (flat index pair_index i32 [P]); pair_visit i32 [P] with values in [0,V);
//   index i32 [T,J], scales [T,J] or undefined. Pairs of one visit need not be adjacent.
// dtypes: rows f32/bf16/f64; gates, scales f32 (f64); sums in f32 (f64). dgates '+=' when accumulate_dgates, else '='; entries of
//   dgates that no pair names are not touched; pair_index names an entry at most once. da, dgates may be undefined. Deterministic.
// Indices are checked on the CPU only: the host does not read a GPU's. On sim and cuda pair_visit and pair_index may hold -1 (rows
//   behind a plan's real pairs, kernels/dispatch_plan.h): such a pair adds nothing and its rows are not written.

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct GatedSum {
  Tensor a, gates, pair_index, pair_visit;
  Tensor s;
};
struct GatedSumBackward {
  Tensor a, ds, gates, pair_index, pair_visit;
  bool accumulate_da = false, accumulate_dgates = false;
  Tensor da, dgates;
};
struct SumPairs {
  Tensor x, pair_visit;
  Tensor y;
};
struct ExpandPairs {
  Tensor x, pair_visit;
  Tensor y;
};
struct Combine {
  Tensor x, index, scales;
  bool accumulate = false;
  Tensor y;
};
void run(const GatedSum& op);
void run(const GatedSumBackward& op);
void run(const SumPairs& op);
void run(const ExpandPairs& op);
void run(const Combine& op);

}  // namespace lightmoe
