#include "compress/clustering.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "runtime/philox.h"

namespace lightmoe {
namespace {

constexpr int kMaxRounds = 100;

Clusters sorted(Clusters clusters) {
  for (auto& cluster : clusters) std::sort(cluster.begin(), cluster.end());
  std::sort(clusters.begin(), clusters.end());
  return clusters;
}

double dot(const double* x, const double* y, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

void normalise(double* x, size_t n) {
  const double norm = std::sqrt(dot(x, x, n));
  for (size_t i = 0; i < n && norm > 0; ++i) x[i] /= norm;
}

class CosineKMeans {
 public:
  CosineKMeans(const std::vector<double>& features, int64_t n, int64_t count)
      : rows_(features), n_(static_cast<size_t>(n)), k_(static_cast<size_t>(count)), width_(features.size() / n_) {
    for (size_t i = 0; i < n_; ++i) normalise(&rows_[i * width_], width_);
  }

  Clusters run(uint64_t seed) {
    start(seed);
    std::vector<size_t> before;
    for (int round = 0; round < kMaxRounds && before != owner_; ++round) {
      before = owner_;
      assign();
      fill_empty();
      move_centres();
    }
    Clusters clusters(k_);
    for (size_t i = 0; i < n_; ++i) clusters[owner_[i]].push_back(static_cast<int32_t>(i));
    return sorted(std::move(clusters));
  }

 private:
  double distance(size_t row, size_t centre) const {
    return 1 - dot(&rows_[row * width_], &centres_[centre * width_], width_);
  }

  void start(uint64_t seed) {
    Philox random(seed, 0xc1u);
    std::vector<double> nearest(n_, std::numeric_limits<double>::infinity());
    std::vector<uint8_t> taken(n_, 0);
    size_t next = random.below(n_);
    for (size_t c = 0; c < k_; ++c) {
      taken[next] = 1;
      centres_.insert(centres_.end(), rows_.begin() + static_cast<std::ptrdiff_t>(next * width_),
                      rows_.begin() + static_cast<std::ptrdiff_t>((next + 1) * width_));
      double sum = 0;
      for (size_t i = 0; i < n_; ++i) {
        nearest[i] = taken[i] ? 0 : std::min(nearest[i], std::max(0.0, distance(i, c)));
        sum += nearest[i];
      }
      double left = random.uniform() * sum;
      next = n_;
      for (size_t i = 0; i < n_; ++i) {
        if (taken[i]) continue;
        next = i;
        left -= nearest[i];
        if (left < 0) break;
      }
    }
    owner_.assign(n_, 0);
  }

  void assign() {
    for (size_t i = 0; i < n_; ++i) {
      for (size_t c = 0; c < k_; ++c) {
        if (c == 0 || distance(i, c) < distance(i, owner_[i])) owner_[i] = c;
      }
    }
  }

  void fill_empty() {
    for (size_t c = 0; c < k_; ++c) {
      if (std::find(owner_.begin(), owner_.end(), c) != owner_.end()) continue;
      size_t farthest = n_;
      for (size_t i = 0; i < n_; ++i) {
        if (std::count(owner_.begin(), owner_.end(), owner_[i]) < 2) continue;
        if (farthest == n_ || distance(i, owner_[i]) > distance(farthest, owner_[farthest])) farthest = i;
      }
      owner_[farthest] = c;
    }
  }

  void move_centres() {
    std::fill(centres_.begin(), centres_.end(), 0.0);
    for (size_t i = 0; i < n_; ++i) {
      for (size_t j = 0; j < width_; ++j) centres_[owner_[i] * width_ + j] += rows_[i * width_ + j];
    }
    for (size_t c = 0; c < k_; ++c) normalise(&centres_[c * width_], width_);
  }

  std::vector<double> rows_;
  size_t n_, k_, width_;
  std::vector<double> centres_;
  std::vector<size_t> owner_;
};

}  // namespace

Clusters average_linkage(const std::vector<double>& distances, int64_t n, int64_t count) {
  std::vector<double> d = distances;
  const auto size = static_cast<size_t>(n);
  Clusters clusters(size);
  for (size_t i = 0; i < size; ++i) clusters[i] = {static_cast<int32_t>(i)};
  std::vector<uint8_t> gone(size, 0);
  for (int64_t left = n; left > count; --left) {
    size_t a = size, b = size;
    for (size_t i = 0; i < size; ++i) {
      for (size_t j = i + 1; j < size; ++j) {
        if (gone[i] || gone[j]) continue;
        if (a == size || d[i * size + j] < d[a * size + b]) a = i, b = j;
      }
    }
    const auto wa = static_cast<double>(clusters[a].size()), wb = static_cast<double>(clusters[b].size());
    for (size_t j = 0; j < size; ++j) {
      d[a * size + j] = d[j * size + a] = (wa * d[a * size + j] + wb * d[b * size + j]) / (wa + wb);
    }
    clusters[a].insert(clusters[a].end(), clusters[b].begin(), clusters[b].end());
    gone[b] = 1;
  }
  Clusters out;
  for (size_t i = 0; i < size; ++i) {
    if (!gone[i]) out.push_back(clusters[i]);
  }
  return sorted(std::move(out));
}

Clusters cosine_kmeans(const std::vector<double>& features, int64_t n, int64_t count, uint64_t seed) {
  return CosineKMeans(features, n, std::min(n, count)).run(seed);
}

std::vector<double> euclidean_distances(const std::vector<double>& features, int64_t n) {
  const auto size = static_cast<size_t>(n), width = features.size() / size;
  std::vector<double> d(size * size, 0.0);
  for (size_t i = 0; i < size; ++i) {
    for (size_t j = i + 1; j < size; ++j) {
      double sum = 0;
      for (size_t k = 0; k < width; ++k) {
        const double x = features[i * width + k] - features[j * width + k];
        sum += x * x;
      }
      d[i * size + j] = d[j * size + i] = std::sqrt(sum);
    }
  }
  return d;
}

}  // namespace lightmoe
