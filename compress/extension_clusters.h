#pragma once
// Where the clusters of extension mor1e start: means of the k-means clusters (by cosine) of what each layer's router saw of the
// calibration's token sample, scaled to the inputs' mean length.

#include "compress/statistics.h"
#include "model/olmoe.h"

namespace lightmoe {

// Error(kUsage): the extension of the model has no clusters; Error(kInput): statistics without the inputs of their sample, or of other sizes.
void start_clusters(Olmoe& model, const Statistics& statistics, uint64_t seed);

}  // namespace lightmoe
