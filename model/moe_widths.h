#pragma once
// A layer whose experts differ in width (units were removed inside some) as a sum of layers of one width each:
//   y = sum over the widths F of the gated outputs of the slots whose expert has F units
// Every part is a MoeLayer that shares the parameters; slots of other widths count as removed in it, so that a pass drops their
// pairs. Grouped products then see matrices of one shape, rows carry no padding, and adapters, latents and merged lanes work as
// ever, on every device. Constants and experts W = 0 without adapter go with the first part. An adapter wider than its expert
// goes with the expert (struct Expert in model/moe.h).
// cost of a part beside its products: one dispatch plan and one combine over [T,K].

#include <vector>

#include "model/moe.h"

namespace lightmoe {

bool has_one_width(const MoeLayer& layer);
// Ascending widths, at least one part; those that no entry of `slots` [T,K] names are left out where the host can read it.
std::vector<MoeLayer> split_by_width(const MoeLayer& layer, const Tensor& slots);

}  // namespace lightmoe
