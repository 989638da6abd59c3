#pragma once
// Panels of the native GEMM: `width` rows of op(A) or columns of op(B), one step of k after the other, as dwords
// (gemm_native_simd.h). Conversion, rounding, transposition and gather happen here.

#include "kernels/gemm_native_simd.h"
#include "kernels/gemm_problem.h"

namespace lightmoe::native {

struct PanelSource {
  GemmMatrix matrix;
  bool lanes_are_rows;  // a lane of the panel is a stored row (k runs along it), else a stored column
  GemmCompute compute;
};
inline PanelSource panels_of_a(const GemmProblem& p, GemmCompute compute) { return {p.a, !p.a.transposed, compute}; }
inline PanelSource panels_of_b(const GemmProblem& p, GemmCompute compute) { return {p.b, p.b.transposed, compute}; }

inline int64_t k_per_step(GemmCompute compute) { return compute == GemmCompute::kBF16 ? 2 : 1; }
inline int64_t steps_of(GemmCompute compute, int64_t k) { return (k + k_per_step(compute) - 1) / k_per_step(compute); }

// panel[s * width + w] for the k in [k_begin, k_end) and lanes [lane, lane + count), count >= 1; lanes from count to width
// hold what does not matter.
// k_begin is a multiple of the k of a step; a step that k_end cuts in half is completed by a zero.
// width is below kLanes or a multiple of it.
// NOTE: below kLanes the last step writes up to kLanes dwords past its start: pack panels in ascending order, with
// kLanes dwords of slack behind the last.
void pack_panel(const PanelSource& source, int64_t lane, int count, int width, int64_t k_begin, int64_t k_end,
                uint32_t* panel);

}  // namespace lightmoe::native
