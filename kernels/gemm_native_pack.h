#pragma once
// Panels of the native GEMM: some rows of op(A) or columns of op(B), one step of k after the other, as dwords
// (gemm_native_simd.h). Conversion, rounding, transposition and gather happen here.

#include <algorithm>

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

// `lanes` rows or columns from `first` on in panels of nearly equal width: multiples of `unit`, at most `max_units` of them.
struct Panels {
  int64_t first, lanes, unit, units, count;
  Panels(int64_t first, int64_t lanes, int64_t unit, int64_t max_units)
      : first(first),
        lanes(lanes),
        unit(unit),
        units((lanes + unit - 1) / unit),
        count((units + max_units - 1) / max_units) {}
  int64_t begin(int64_t i) const { return units * i / count * unit; }  // relative to first
  int width(int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
  int lanes_in(int64_t i) const { return static_cast<int>(std::min(begin(i + 1), lanes) - begin(i)); }
  int64_t padded() const { return units * unit; }
};

// Panels [panel_begin, panel_end) for the k in [k_begin, k_end), one behind the other:
//   to[(begin(i) - begin(panel_begin)) * steps + s * width(i) + w],  s in [0, steps_of(k_end - k_begin)), at most steps
// Lanes behind the last hold what does not matter. k_begin is a multiple of the k of a step; a step that k_end cuts in
// half is completed by a zero. unit is 1 or kLanes.
// NOTE: up to kLanes dwords behind the last panel may be written too.
void pack(const PanelSource& source, const Panels& panels, int64_t panel_begin, int64_t panel_end, int64_t k_begin,
          int64_t k_end, int64_t steps, uint32_t* to);

}  // namespace lightmoe::native
