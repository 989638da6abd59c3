#pragma once
// One expert's selector of compress/unit_split.h.

#include "compress/unit_split.h"

namespace lightmoe {

struct UnitSelector {
  Tensor in, out;  // [N,D], [N,N] f32
};
// x [n,D] f32, contributions [n,N] f32. seed: of the start and of the order of the rows.
UnitSelector train_selector(const Tensor& x, const Tensor& contributions, const UnitSplitOptions& options,
                            uint64_t seed);
// Scores [n,N].
Tensor select_scores(const UnitSelector& selector, const Tensor& x);

}  // namespace lightmoe
