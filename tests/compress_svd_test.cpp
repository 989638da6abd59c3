#include "compress/svd.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/support/testing.h"

namespace lightmoe {
namespace {

// ||W - B A||_F^2 in double.
double error2(const Tensor& w, const LowRank& f) {
  const std::vector<double> x = testing::to_doubles(w), b = testing::to_doubles(f.b), a = testing::to_doubles(f.a);
  const int64_t m = w.dim(0), n = w.dim(1), rank = f.a.dim(0);
  double sum = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double v = x[static_cast<size_t>(i * n + j)];
      for (int64_t r = 0; r < rank; ++r) v -= b[static_cast<size_t>(i * rank + r)] * a[static_cast<size_t>(r * n + j)];
      sum += v * v;
    }
  }
  return sum;
}

double norm2(const Tensor& w) {
  double sum = 0;
  for (const double v : testing::to_doubles(w)) sum += v * v;
  return sum;
}

TEST(LowRank, DiagonalByHand) {
  // Singular values 4, 3, 1: rank 2 keeps 4 (row 1) and 3 (row 0).
  const Tensor w = Tensor::from(std::vector<double>{0, -3, 0, 4, 0, 0, 0, 0, 1}, {3, 3});
  const LowRank f = best_low_rank(w, 2, 1);
  EXPECT_NEAR(f.singular_values[0], 4, 1e-14);
  EXPECT_NEAR(f.singular_values[1], 3, 1e-14);
  EXPECT_NEAR(error2(w, f), 1, 1e-13);
  // Split by the square root: |b column|^2 = |a row|^2 = sigma.
  double b0 = 0, a0 = 0;
  for (int i = 0; i < 3; ++i) {
    b0 += f.b.data<double>()[i * 2] * f.b.data<double>()[i * 2];
    a0 += f.a.data<double>()[i] * f.a.data<double>()[i];
  }
  EXPECT_NEAR(b0, 4, 1e-13);
  EXPECT_NEAR(a0, 4, 1e-13);
}

// Eckart-Young: the error is the sum of the squares of the values left out, and with all of them the matrix comes back.
TEST(LowRank, ErrorIsWhatTheSpectrumSays) {
  for (const auto& [m, n] : {std::pair<int64_t, int64_t>{1, 1}, {7, 31}, {31, 7}, {33, 33}, {64, 128}}) {
    const Tensor w = testing::random_tensor({m, n}, DType::kF64, static_cast<uint64_t>(m * 1000 + n));
    const int64_t full = std::min(m, n);
    const LowRank all = best_low_rank(w, full, 1);
    EXPECT_LE(error2(w, all), 1e-24 * norm2(w));
    for (const int64_t rank : {int64_t{0}, full / 2, full - 1}) {
      double tail = 0;
      for (int64_t i = rank; i < full; ++i) tail += std::pow(all.singular_values[static_cast<size_t>(i)], 2);
      EXPECT_NEAR(error2(w, best_low_rank(w, rank, 1)), tail, 1e-12 * norm2(w)) << m << " x " << n << " rank " << rank;
    }
    const LowRank more = best_low_rank(w, full + 2, 1);
    EXPECT_EQ(more.singular_values.back(), 0);
    EXPECT_LE(error2(w, more), 1e-24 * norm2(w));
  }
}

TEST(LowRank, ZeroMatrix) {
  const LowRank f = best_low_rank(Tensor::zeros({5, 4}, DType::kF32), 2, 1);
  EXPECT_EQ(norm2(f.a) + norm2(f.b), 0);
}

// 200 x 180 is past the Jacobi size. The exact spectrum comes from the Gram matrix through the small path's own Jacobi.
TEST(LowRank, SubspaceIterationIsNearTheOptimum) {
  const int64_t m = 200, n = 180, rank = 16;
  const Tensor w = testing::random_tensor({m, n}, DType::kF32, 5);
  const LowRank f = best_low_rank(w, rank, 1);
  // A flat spectrum is the worst case. Optimum: drop to 150 columns at a time is not possible, so bound by the full Jacobi.
  const LowRank exact = best_low_rank(w, n, 1);  // rank + oversampling does not fit: Jacobi
  double tail = 0;
  for (int64_t i = rank; i < n; ++i) tail += std::pow(exact.singular_values[static_cast<size_t>(i)], 2);
  EXPECT_LE(error2(w, f), tail * 1.005);
  EXPECT_GE(error2(w, f), tail * (1 - 1e-9));
  EXPECT_NEAR(f.singular_values[0], exact.singular_values[0], 1e-3 * exact.singular_values[0]);
  // Low rank plus little: found exactly.
  Tensor low = Tensor::zeros({m, n}, DType::kF64);
  const Tensor u = testing::random_tensor({m, 3}, DType::kF64, 6), v = testing::random_tensor({3, n}, DType::kF64, 7);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t j = 0; j < n; ++j)
        low.data<double>()[i * n + j] += u.data<double>()[i * 3 + r] * v.data<double>()[r * n + j];
    }
  }
  EXPECT_LE(error2(low, best_low_rank(low, 3, 1)), 1e-20 * norm2(low));
}

TEST(LowRank, SameSeedSameBits) {
  const Tensor w = testing::random_tensor({170, 190}, DType::kF32, 8);
  const LowRank f = best_low_rank(w, 4, 9), g = best_low_rank(w, 4, 9);
  EXPECT_TRUE(testing::bits_equal(f.a, g.a));
  EXPECT_TRUE(testing::bits_equal(f.b, g.b));
}

}  // namespace
}  // namespace lightmoe
