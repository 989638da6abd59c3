#include "kernels/softmax_top.h"

#include <numeric>

#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

struct Case {
  int64_t rows, n, k;
};
// No rows, one column, fewer and more columns than a warp has lanes, rows that fill no block.
const std::vector<Case> kCases = {{0, 3, 1}, {1, 1, 1}, {5, 7, 3}, {9, 33, 33}, {6, 70, 5}, {130, 8, 2}};

// Columns of a row, the largest first, ties to the lower; the definition.
std::vector<size_t> ranked(const double* row, size_t n) {
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [row](size_t a, size_t b) { return row[a] != row[b] ? row[a] > row[b] : a < b; });
  return order;
}

// A row is a handful of sums of n terms of order one and an exponential; f32 on devices, f64 otherwise, rounded to the type.
double tolerance_of(DType dtype, const Case& c) {
  return testing::sum_tolerance(default_device() == DeviceKind::kCpu && dtype == DType::kF64 ? dtype : DType::kF32,
                                c.n) +
         8 * testing::unit_roundoff(dtype);
}

void check_softmax(const Case& c, DType dtype) {
  const Tensor z = random_tensor({c.rows, c.n}, dtype, 1), dp = random_tensor({c.rows, c.n}, dtype, 2);
  const Guarded p(z.shape(), dtype), dz(z.shape(), dtype);
  constexpr double kScale = .7;
  run(SoftmaxTop{.z = z, .k = c.k, .scale = kScale, .p = p.tensor()});
  run(SoftmaxTopBackward{.p = p.tensor(), .dp = dp, .scale = kScale, .dz = dz.tensor()});
  const std::vector<double> in = to_doubles(z), got = to_doubles(p.tensor()), dy = to_doubles(dp);
  std::vector<double> expected(in.size(), 0), gradient(in.size(), 0);
  const auto n = static_cast<size_t>(c.n);
  for (size_t t = 0; t < static_cast<size_t>(c.rows); ++t) {
    const std::vector<size_t> order = ranked(&in[t * n], n);
    double sum = 0, mean = 0;
    for (size_t i = 0; i < static_cast<size_t>(c.k); ++i) sum += std::exp(kScale * in[t * n + order[i]]);
    for (size_t i = 0; i < static_cast<size_t>(c.k); ++i)
      expected[t * n + order[i]] = std::exp(kScale * in[t * n + order[i]]) / sum;
    for (size_t j = 0; j < n; ++j) mean += got[t * n + j] * dy[t * n + j];
    for (size_t j = 0; j < n; ++j) gradient[t * n + j] = kScale * got[t * n + j] * (dy[t * n + j] - mean);
  }
  EXPECT_TRUE(testing::close(p.tensor(), expected, tolerance_of(dtype, c)));
  EXPECT_TRUE(testing::close(dz.tensor(), gradient, tolerance_of(dtype, c), tolerance_of(dtype, c)));
}

void check_keep(const Case& c, DType dtype) {
  const Tensor x = random_tensor({c.rows, c.n}, dtype, 3);
  const Guarded y(x.shape(), dtype);
  const std::vector<double> in = to_doubles(x);
  const auto n = static_cast<size_t>(c.n);
  for (const int64_t k : {int64_t{0}, c.k}) {
    run(KeepLargest{.x = x, .k = k, .y = y.tensor()});
    std::vector<double> expected(in.size(), 0);
    for (size_t t = 0; t < static_cast<size_t>(c.rows); ++t) {
      const std::vector<size_t> order = ranked(&in[t * n], n);
      for (size_t i = 0; i < static_cast<size_t>(k); ++i) expected[t * n + order[i]] = 1;
    }
    EXPECT_TRUE(testing::close(y.tensor(), expected, 0));
  }
}

void check_shares(const Case& c, DType dtype) {
  const Tensor x = random_tensor({c.rows, c.n}, dtype, 4), dy = random_tensor({c.rows, c.n}, dtype, 5);
  const Guarded y(x.shape(), dtype), dx(x.shape(), dtype);
  run(ShareOfRow{.x = x, .y = y.tensor()});
  run(ShareOfRowBackward{.x = x, .y = y.tensor(), .dy = dy, .dx = dx.tensor()});
  const std::vector<double> in = to_doubles(x), got = to_doubles(y.tensor()), d = to_doubles(dy);
  const auto n = static_cast<size_t>(c.n);
  for (size_t t = 0; t < static_cast<size_t>(c.rows); ++t) {
    double sum = 0, size = 0, mean = 0, steps = 0;
    for (size_t j = t * n; j < (t + 1) * n; ++j) {
      sum += in[j], size += std::abs(in[j]), mean += got[j] * d[j], steps += std::abs(got[j] * d[j]);
    }
    // The sum may cancel: its error is that of its terms.
    const double tolerance = tolerance_of(dtype, c) * (1 + size / std::abs(sum));
    for (size_t j = t * n; j < (t + 1) * n; ++j) {
      ASSERT_NEAR(got[j], in[j] / sum, tolerance * std::abs(in[j] / sum));
      ASSERT_NEAR(to_doubles(dx.tensor())[j], (d[j] - mean) / sum,
                  tolerance * (std::abs(d[j]) + steps) / std::abs(sum));
    }
  }
}

void check_cases() {
  for (const Case& c : kCases) {
    for (const DType dtype : testing::floating_dtypes()) {
      SCOPED_TRACE(::testing::Message() << c.rows << "x" << c.n << " k " << c.k << " " << name_of(dtype));
      check_softmax(c, dtype);
      check_keep(c, dtype);
      check_shares(c, dtype);
    }
  }
}

TEST(SoftmaxTop, MatchesTheEquations) {
  testing::on_each_device<SoftmaxTop, SoftmaxTopBackward, KeepLargest, ShareOfRow, ShareOfRowBackward>(check_cases);
}

void check_ties() {
  const Tensor z = Tensor::from<float>({1, 3, 2, 3, 3, 0, 0, 0, 0, 0}, {2, 5}), p = Tensor::empty({2, 5}, DType::kF32);
  run(SoftmaxTop{.z = z, .k = 2, .p = p});
  EXPECT_TRUE(testing::close(p, {0, .5, 0, .5, 0, .5, .5, 0, 0, 0}, 1e-7));
  run(KeepLargest{.x = z, .k = 4, .y = p});
  EXPECT_TRUE(testing::close(p, {0, 1, 1, 1, 1, 1, 1, 1, 1, 0}, 0));
  run(ShareOfRow{.x = z, .y = p});
  EXPECT_TRUE(testing::close(p.slice(1, 2), {0, 0, 0, 0, 0}, 0));
  run(ShareOfRowBackward{.x = z, .y = p, .dy = z.clone(), .dx = z.clone()});
}

TEST(SoftmaxTop, TiesGoToTheLowerColumn) { testing::on_each_device<SoftmaxTop, KeepLargest, ShareOfRow>(check_ties); }

TEST(SoftmaxTop, RefusesWrongNumbers) {
  const Tensor z = Tensor::zeros({1, 3}, DType::kF32);
  for (const int64_t k : {0, 4}) EXPECT_THROW(run(SoftmaxTop{.z = z, .k = k, .p = z}), Error);
  EXPECT_THROW(run(KeepLargest{.x = z, .k = 4, .y = z}), Error);
}

}  // namespace
}  // namespace lightmoe
