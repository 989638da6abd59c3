// UNCURL ("Revisiting SMoE by task-specific expert pruning", arXiv 2409.01483): spectral clusters of experts by the task's router logits.
//   affinity = (1 + cosine of router-logit columns) / 2;  rows of the first r eigenvectors of D^{-1/2} A D^{-1/2}, made unit length, are
//   clustered by k-means;  members are aligned (permutation of units) and averaged by how often they are used.
// Published (summaries only): spectral clustering on task router logits, alignment, activation-weighted merge, before fine-tuning. Our
// reading: the affinity and the normalised cut (Ng, Jordan, Weiss 2001); slots of a cluster share its expert, router rows stay; the
// same r in every layer. Changed: alignment by weights to the most used member.

#include <algorithm>
#include <cmath>

#include "compress/clustering.h"
#include "compress/expert_budget.h"
#include "compress/linear_algebra.h"
#include "compress/merging.h"

namespace lightmoe {
namespace {

// [n*r]: the spectral embedding.
std::vector<double> embedding(const std::vector<double>& similarity, int64_t n, int64_t r) {
  const Tensor a = Tensor::empty({n, n}, DType::kF64);
  std::vector<double> degree(static_cast<size_t>(n), 0.0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double v = (1 + similarity[static_cast<size_t>(i * n + j)]) / 2;
      a.data<double>()[i * n + j] = v;
      degree[static_cast<size_t>(i)] += v;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double norm = std::sqrt(degree[static_cast<size_t>(i)] * degree[static_cast<size_t>(j)]);
      a.data<double>()[i * n + j] = norm > 0 ? a.data<double>()[i * n + j] / norm : 0;
    }
  }
  const Eigen eigen = symmetric_eigen(a);
  std::vector<double> rows(static_cast<size_t>(n * r));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < r; ++k) rows[static_cast<size_t>(i * r + k)] = eigen.vectors.data<double>()[k * n + i];
  }
  return rows;
}

Plan plan(const MethodInput& input) {
  const int64_t clusters = experts_per_layer(input, 1), slots = input.config.num_experts;
  return plan_merging(
      input,
      [&](int64_t l) {
        const LayerStatistics& layer = input.statistics.layers[static_cast<size_t>(l)];
        std::vector<double> similarity = logit_similarity(input.statistics, l);
        if (similarity.empty()) similarity.assign(static_cast<size_t>(slots * slots), 0.0);  // no sample
        std::vector<SlotGroup> groups;
        for (std::vector<int32_t> cluster : cosine_kmeans(embedding(similarity, slots, clusters), slots, clusters,
                                                          input.options.seed + static_cast<uint64_t>(l))) {
          std::stable_sort(cluster.begin(), cluster.end(), [&](int32_t a, int32_t b) {
            return layer.count[static_cast<size_t>(a)] > layer.count[static_cast<size_t>(b)];
          });
          groups.push_back(group_by_use(layer, cluster));
        }
        return groups;
      },
      {.align = true, .refit = input.options.refit});
}

const RegisterMethod method{{.name = "uncurl",
                             .summary = "spectral clusters of the task's router logits, aligned and averaged by use",
                             .paper = "2409.01483",
                             .slots = "shared",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kSums,
                             .train_free = true,
                             .compresses = true,
                             .merges = true}};

}  // namespace
}  // namespace lightmoe
