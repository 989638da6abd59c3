#pragma once
// Clusters of one size, by cosine: k-means (compress/clustering.h) for the first centres, then rounds of
//   assign   pairs (row, centre) in falling order of their cosine, where the row has no cluster yet and the cluster has room
//   move     a centre is the mean of its rows
// until nothing changes or `rounds` have passed. Published for MoEfication: balanced k-means by minimum-cost flow; the greedy assignment is
// ours. Deterministic; ties go to the lower row, then the lower centre.

#include "compress/clustering.h"

namespace lightmoe {

// features [n*width]; count must divide n (Error(kInternal)). Every cluster has n / count members.
Clusters balanced_kmeans(const std::vector<double>& features, int64_t n, int64_t count, uint64_t seed,
                         int64_t rounds = 20);

}  // namespace lightmoe
