#include "compress/balanced_kmeans.h"

#include <algorithm>
#include <cmath>

#include "runtime/error.h"

namespace lightmoe {
namespace {

class BalancedKMeans {
 public:
  BalancedKMeans(const std::vector<double>& features, int64_t n, int64_t count)
      : rows_(features), n_(static_cast<size_t>(n)), k_(static_cast<size_t>(count)), width_(features.size() / n_) {
    for (size_t i = 0; i < n_; ++i) normalise(&rows_[i * width_]);
  }

  Clusters run(uint64_t seed, int64_t rounds) {
    move_centres(cosine_kmeans(rows_, static_cast<int64_t>(n_), static_cast<int64_t>(k_), seed));
    Clusters clusters = assign();
    for (int64_t round = 1; round < rounds; ++round) {
      move_centres(clusters);
      Clusters next = assign();
      if (next == clusters) break;
      clusters = std::move(next);
    }
    std::sort(clusters.begin(), clusters.end());  // by their lowest member
    return clusters;
  }

 private:
  void normalise(double* row) const {
    double sum = 0;
    for (size_t j = 0; j < width_; ++j) sum += row[j] * row[j];
    for (size_t j = 0; sum > 0 && j < width_; ++j) row[j] /= std::sqrt(sum);
  }

  void move_centres(const Clusters& clusters) {
    centres_.assign(k_ * width_, 0.0);
    for (size_t c = 0; c < clusters.size(); ++c) {
      for (const int32_t i : clusters[c]) {
        for (size_t j = 0; j < width_; ++j) centres_[c * width_ + j] += rows_[static_cast<size_t>(i) * width_ + j];
      }
      normalise(&centres_[c * width_]);
    }
  }

  Clusters assign() const {
    struct Pair {
      double cosine;
      int32_t row, centre;
    };
    std::vector<Pair> pairs;
    for (size_t i = 0; i < n_; ++i) {
      for (size_t c = 0; c < k_; ++c) {
        double cosine = 0;
        for (size_t j = 0; j < width_; ++j) cosine += rows_[i * width_ + j] * centres_[c * width_ + j];
        pairs.push_back({cosine, static_cast<int32_t>(i), static_cast<int32_t>(c)});
      }
    }
    std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.cosine > b.cosine; });
    Clusters clusters(k_);
    std::vector<uint8_t> placed(n_, 0);
    for (const Pair& p : pairs) {
      auto& cluster = clusters[static_cast<size_t>(p.centre)];
      if (placed[static_cast<size_t>(p.row)] || cluster.size() == n_ / k_) continue;
      placed[static_cast<size_t>(p.row)] = 1;
      cluster.push_back(p.row);
    }
    for (auto& cluster : clusters) std::sort(cluster.begin(), cluster.end());
    return clusters;
  }

  std::vector<double> rows_;
  size_t n_, k_, width_;
  std::vector<double> centres_;
};

}  // namespace

Clusters balanced_kmeans(const std::vector<double>& features, int64_t n, int64_t count, uint64_t seed, int64_t rounds) {
  require(count >= 1 && n % count == 0, "balanced_kmeans: {} rows in {} clusters of one size", n, count);
  return BalancedKMeans(features, n, count).run(seed, rounds);
}

}  // namespace lightmoe
