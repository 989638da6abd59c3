#pragma once
// Groups of experts by features or distances. Deterministic; ties go to the lower index.

#include <cstdint>
#include <vector>

namespace lightmoe {

using Clusters = std::vector<std::vector<int32_t>>;  // members ascending, clusters by their lowest member

// Agglomerative, average linkage (UPGMA) on distances [n*n], until `count` clusters are left.
Clusters average_linkage(const std::vector<double>& distances, int64_t n, int64_t count);

// Rows of features [n*width] compared by cosine: k-means++ start from the seed (Arthur and Vassilvitskii 2007), then Lloyd's rounds
// until nothing moves. No cluster stays empty: it takes the row farthest from its own centre.
Clusters cosine_kmeans(const std::vector<double>& features, int64_t n, int64_t count, uint64_t seed);

std::vector<double> euclidean_distances(const std::vector<double>& features, int64_t n);  // [n*n]

}  // namespace lightmoe
