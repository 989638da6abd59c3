// Cholesky, triangular solves, eigenvectors, assignment and clustering against their definitions.

#include "compress/linear_algebra.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "compress/assignment.h"
#include "compress/clustering.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::random_tensor;
using testing::to_doubles;

// X^T X + small: symmetric positive definite.
Tensor positive(int64_t n, uint64_t seed) {
  const Tensor x = random_tensor({2 * n + 1, n}, DType::kF64, seed);
  return with_ridge(product(x, true, x, false), 1e-3);
}

TEST(LinearAlgebra, CholeskyAndSolves) {
  for (const int64_t n : {1, 2, 7, 33}) {
    const Tensor a = positive(n, 3), l = cholesky(a), b = random_tensor({n, 5}, DType::kF64, 4);
    EXPECT_TRUE(testing::close(product(l, false, l, true), to_doubles(a), 1e-13));
    EXPECT_TRUE(testing::close(product(a, false, cholesky_solve(l, b), false), to_doubles(b), 1e-9));
    const Tensor rows = transpose(b);
    EXPECT_TRUE(testing::close(product(solve_right(l, rows, false), false, l, true), to_doubles(rows), 1e-10));
    EXPECT_TRUE(testing::close(product(solve_right(l, rows, true), false, l, false), to_doubles(rows), 1e-10));
  }
  Tensor indefinite = Tensor::zeros({2, 2}, DType::kF64);
  indefinite.data<double>()[0] = 1, indefinite.data<double>()[3] = -1;
  EXPECT_TRUE(testing::fails_with(ErrorKind::kNumeric, {"pivot 1 of 2"}, [&] { cholesky(indefinite); }));
  EXPECT_EQ(to_doubles(with_ridge(Tensor::zeros({2, 2}, DType::kF64), .1)), (std::vector<double>{1, 0, 0, 1}));
}

void expect_eigen(const Tensor& a) {
  const int64_t n = a.dim(0);
  const Eigen eigen = symmetric_eigen(a);
  const Tensor scaled = eigen.vectors.clone();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) scaled.data<double>()[i * n + j] *= eigen.values[static_cast<size_t>(i)];
  }
  EXPECT_TRUE(testing::close(product(eigen.vectors, true, scaled, false), to_doubles(a), 1e-12, 1e-14)) << n;
  std::vector<double> identity(static_cast<size_t>(n * n), 0.0);
  for (int64_t i = 0; i < n; ++i) identity[static_cast<size_t>(i * n + i)] = 1;
  EXPECT_TRUE(testing::close(product(eigen.vectors, false, eigen.vectors, true), identity, 1e-12)) << n;
  EXPECT_TRUE(std::is_sorted(eigen.values.rbegin(), eigen.values.rend()));
}

TEST(LinearAlgebra, SymmetricEigen) {
  for (const int64_t n : {1, 2, 3, 31, 64}) {
    const Tensor x = random_tensor({n, n}, DType::kF64, 9), sum = transpose(x);
    for (int64_t i = 0; i < x.numel(); ++i) sum.data<double>()[i] += x.data<double>()[i];
    expect_eigen(sum);
  }
  const Tensor low = random_tensor({3, 20}, DType::kF64, 10);
  expect_eigen(product(low, true, low, false));  // rank 3 of 20: seventeen equal eigenvalues
  expect_eigen(with_ridge(Tensor::zeros({5, 5}, DType::kF64), 1));
  expect_eigen(Tensor::zeros({4, 4}, DType::kF64));
  // [[2, 1], [1, 2]]: 3 along (1, 1), 1 along (1, -1).
  const Eigen by_hand = symmetric_eigen(Tensor::from<double>({2, 1, 1, 2}, {2, 2}));
  EXPECT_NEAR(by_hand.values[0], 3, 1e-14);
  EXPECT_NEAR(by_hand.values[1], 1, 1e-14);
  EXPECT_NEAR(by_hand.vectors.data<double>()[0], by_hand.vectors.data<double>()[1], 1e-14);
}

TEST(Assignment, IsTheCheapestOfAllPermutations) {
  EXPECT_EQ(cheapest_assignment({4, 1, 3, 2, 0, 5, 3, 2, 2}, 3), (std::vector<int32_t>{1, 0, 2}));  // 1 + 2 + 2
  Philox random(5);
  for (const int64_t n : {1, 2, 4, 6}) {
    for (int trial = 0; trial < 20; ++trial) {
      std::vector<double> cost(static_cast<size_t>(n * n));
      for (double& c : cost) c = std::floor(10 * random.normal());  // ties occur
      std::vector<int32_t> order(static_cast<size_t>(n));
      std::iota(order.begin(), order.end(), 0);
      const auto total = [&](const std::vector<int32_t>& columns) {
        double sum = 0;
        for (size_t i = 0; i < columns.size(); ++i) {
          sum += cost[i * columns.size() + static_cast<size_t>(columns[i])];
        }
        return sum;
      };
      double best = total(order);
      do best = std::min(best, total(order));
      while (std::next_permutation(order.begin(), order.end()));
      std::vector<int32_t> found = cheapest_assignment(cost, n);
      EXPECT_EQ(total(found), best);
      std::sort(found.begin(), found.end());
      std::iota(order.begin(), order.end(), 0);
      EXPECT_EQ(found, order);
    }
  }
}

TEST(Clustering, AverageLinkageByHand) {
  // On a line: 0, 1, 10, 12, 30. First {0,1} (1), then {10,12} (2); then {0,1} and {10,12} at (10+12+9+11)/4 = 10.5 before 30 at 19.
  const std::vector<double> d = euclidean_distances({0, 1, 10, 12, 30}, 5);
  EXPECT_EQ(average_linkage(d, 5, 5).size(), 5u);
  EXPECT_EQ(average_linkage(d, 5, 3), (Clusters{{0, 1}, {2, 3}, {4}}));
  EXPECT_EQ(average_linkage(d, 5, 2), (Clusters{{0, 1, 2, 3}, {4}}));
  EXPECT_EQ(average_linkage(d, 5, 1), (Clusters{{0, 1, 2, 3, 4}}));
}

TEST(Clustering, CosineKMeansFindsDirections) {
  // Three directions, lengths that do not matter.
  const std::vector<double> rows = {1, 0, 0, 5, .1, 0, 0, 2, .1, 0, 9, 0, 0, 0, 3, .1, 0, 7};
  for (uint64_t seed = 0; seed < 20; ++seed) {
    EXPECT_EQ(cosine_kmeans(rows, 6, 3, seed), (Clusters{{0, 1}, {2, 3}, {4, 5}})) << seed;
  }
  EXPECT_EQ(cosine_kmeans(rows, 6, 6, 1).size(), 6u);
  const Clusters same =
      cosine_kmeans(std::vector<double>(8, 1.0), 4, 3, 1);  // equal rows: still three clusters, none empty
  EXPECT_EQ(same.size(), 3u);
  for (const auto& cluster : same) EXPECT_FALSE(cluster.empty());
}

}  // namespace
}  // namespace lightmoe
