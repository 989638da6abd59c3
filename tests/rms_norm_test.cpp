#include "kernels/rms_norm.h"

#include "kernels/elementwise.h"
#include "tests/cases/rms_norm.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

constexpr double kEps = 1e-5;

// The equation in double, one row at a time.
struct Oracle {
  std::vector<double> y, rstd, dx, dw;
  double largest_term = 0;  // of the two that dx subtracts: their rounding errors survive the cancellation
  Oracle(const Tensor& x, const Tensor& w, const Tensor& dy) {
    const std::vector<double> xs = to_doubles(x), ws = to_doubles(w), dys = to_doubles(dy);
    const size_t rows = static_cast<size_t>(x.dim(0)), n = static_cast<size_t>(x.dim(1));
    y.resize(rows * n), rstd.resize(rows), dx.resize(rows * n), dw.assign(n, 0);
    for (size_t t = 0; t < rows; ++t) {
      double squares = 0, dot = 0;
      for (size_t i = 0; i < n; ++i) squares += xs[t * n + i] * xs[t * n + i];
      const double r = rstd[t] = 1 / std::sqrt(squares / static_cast<double>(n) + kEps);
      for (size_t i = 0; i < n; ++i) {
        y[t * n + i] = xs[t * n + i] * r * ws[i];
        dot += dys[t * n + i] * ws[i] * xs[t * n + i];
        dw[i] += dys[t * n + i] * xs[t * n + i] * r;
      }
      for (size_t i = 0; i < n; ++i) {
        largest_term = std::max(largest_term, std::abs(r * dys[t * n + i] * ws[i]));
        dx[t * n + i] = r * (dys[t * n + i] * ws[i] - xs[t * n + i] * r * r * dot / static_cast<double>(n));
      }
    }
  }
};

void check_case(const cases::RmsNormCase& c, DType dtype) {
  SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << c.rows << " x " << c.width);
  const DType accumulator = dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  const Tensor x = random_tensor({c.rows, c.width}, dtype, 1), w = random_tensor({c.width}, dtype, 2);
  const Tensor dy = random_tensor({c.rows, c.width}, dtype, 3);
  const Oracle oracle(x, w, dy);
  const Guarded y({c.rows, c.width}, dtype), rstd({c.rows}, accumulator), dx({c.rows, c.width}, dtype);
  const Tensor dw = Tensor::zeros({c.width}, accumulator);
  run(RmsNorm{.x = x, .w = w, .eps = kEps, .y = y.tensor(), .rstd = rstd.tensor()});
  // Three roundings a value (product, normalisation rounded to dtype, weight) beside the sum's own
  // error.
  const double tolerance = testing::sum_tolerance(dtype, c.width) + 3 * testing::unit_roundoff(dtype);
  EXPECT_TRUE(testing::close(y.tensor(), oracle.y, tolerance));
  EXPECT_TRUE(testing::close(rstd.tensor(), oracle.rstd, tolerance));
  run(RmsNormBackward{.x = x, .w = w, .rstd = rstd.tensor(), .dy = dy, .dx = dx.tensor(), .dw = dw});
  EXPECT_TRUE(testing::close(dx.tensor(), oracle.dx, 0, 4 * tolerance * oracle.largest_term));
  EXPECT_TRUE(testing::close(dw, oracle.dw, testing::sum_tolerance(accumulator, c.rows) + 4 * 0x1p-24));
}

TEST(RmsNorm, MatchesTheEquation) {
  testing::on_each_device<RmsNorm, RmsNormBackward>([] {
    for (const auto& c : cases::rms_norm) {
      for (const DType dtype : testing::floating_dtypes()) check_case(c, dtype);
    }
  });
}

// With a residual: the bits of an addition and a norm of its result, and the gradient of the sum's other readers on top.
void check_residual(const cases::RmsNormCase& c, DType dtype) {
  SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << c.rows << " x " << c.width);
  const DType accumulator = dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  const Shape shape{c.rows, c.width};
  const Tensor x = random_tensor(shape, dtype, 1), residual = random_tensor(shape, dtype, 4);
  const Tensor w = random_tensor({c.width}, dtype, 2), dy = random_tensor(shape, dtype, 3),
               dsum = random_tensor(shape, dtype, 5);
  const Tensor sum = Tensor::empty(shape, dtype), y = Tensor::empty(shape, dtype),
               rstd = Tensor::empty({c.rows}, accumulator);
  run(Add{.a = x, .b = residual, .y = sum});
  run(RmsNorm{.x = sum, .w = w, .eps = kEps, .y = y, .rstd = rstd});
  const Guarded own_sum(shape, dtype), own_y(shape, dtype), own_rstd({c.rows}, accumulator), dx(shape, dtype);
  run(RmsNorm{.x = x,
              .w = w,
              .eps = kEps,
              .y = own_y.tensor(),
              .rstd = own_rstd.tensor(),
              .residual = residual,
              .sum = own_sum.tensor()});
  EXPECT_TRUE(testing::bits_equal(own_sum.tensor(), sum));
  EXPECT_TRUE(testing::bits_equal(own_y.tensor(), y));
  EXPECT_TRUE(testing::bits_equal(own_rstd.tensor(), rstd));
  // The sum over the residual, as the model does.
  const Tensor over = residual.clone();
  run(RmsNorm{.x = x, .w = w, .eps = kEps, .y = own_y.tensor(), .residual = over, .sum = over});
  EXPECT_TRUE(testing::bits_equal(over, sum));
  EXPECT_TRUE(testing::bits_equal(own_y.tensor(), y));

  Oracle oracle(sum, w, dy);
  const std::vector<double> other = to_doubles(dsum);
  for (size_t i = 0; i < other.size(); ++i) oracle.dx[i] += other[i];
  const double tolerance = testing::sum_tolerance(dtype, c.width) + 4 * testing::unit_roundoff(dtype);
  run(RmsNormBackward{.x = sum, .w = w, .rstd = rstd, .dy = dy, .dx = dx.tensor(), .dw = {}, .dsum = dsum});
  EXPECT_TRUE(testing::close(dx.tensor(), oracle.dx, tolerance, 4 * tolerance * oracle.largest_term));
  const Tensor over_dsum = dsum.clone(), dw = Tensor::zeros({c.width}, accumulator);
  run(RmsNormBackward{.x = sum, .w = w, .rstd = rstd, .dy = dy, .dx = over_dsum, .dw = dw, .dsum = over_dsum});
  EXPECT_TRUE(testing::bits_equal(over_dsum, dx.tensor()));
  EXPECT_TRUE(testing::close(dw, oracle.dw, testing::sum_tolerance(accumulator, c.rows) + 4 * 0x1p-24));
}

TEST(RmsNorm, AddsAResidualInTheSamePass) {
  testing::on_each_device<RmsNorm, RmsNormBackward>([] {
    for (const auto& c : cases::rms_norm) {
      for (const DType dtype : testing::floating_dtypes()) check_residual(c, dtype);
    }
  });
}

TEST(RmsNorm, GradientCheck) {
  const Tensor x = random_tensor({3, 7}, DType::kF64, 4), w = random_tensor({7}, DType::kF64, 5);
  const Tensor dy = random_tensor({3, 7}, DType::kF64, 6);
  const Tensor y = Tensor::empty({3, 7}, DType::kF64), rstd = Tensor::empty({3}, DType::kF64);
  const auto loss = [&] {
    run(RmsNorm{.x = x, .w = w, .eps = kEps, .y = y, .rstd = rstd});
    double sum = 0;
    for (int64_t i = 0; i < y.numel(); ++i) sum += y.data<double>()[i] * dy.data<double>()[i];
    return sum;
  };
  loss();
  const Tensor dx = Tensor::empty({3, 7}, DType::kF64), dw = Tensor::zeros({7}, DType::kF64);
  run(RmsNormBackward{.x = x, .w = w, .rstd = rstd, .dy = dy, .dx = dx, .dw = dw});
  EXPECT_TRUE(testing::gradient_matches(loss, x, dx));
  EXPECT_TRUE(testing::gradient_matches(loss, w, dw));
}

void check_in_place() {
  const Tensor x = random_tensor({9, 40}, DType::kF32, 7), w = random_tensor({40}, DType::kF32, 8);
  const Tensor y = Tensor::empty({9, 40}, DType::kF32), rstd = Tensor::empty({9}, DType::kF32);
  run(RmsNorm{.x = x, .w = w, .y = y, .rstd = rstd});
  const Tensor in_place = x.clone();
  run(RmsNorm{.x = in_place, .w = w, .y = in_place});
  EXPECT_TRUE(testing::bits_equal(in_place, y));

  const Tensor dy = random_tensor({9, 40}, DType::kF32, 9), dx = Tensor::empty({9, 40}, DType::kF32);
  const Tensor once = Tensor::zeros({40}, DType::kF32), twice = Tensor::zeros({40}, DType::kF32);
  run(RmsNormBackward{.x = x, .w = w, .rstd = rstd, .dy = dy, .dx = dx, .dw = once});
  for (int i = 0; i < 2; ++i) {
    const Tensor d = dy.clone();
    run(RmsNormBackward{.x = x, .w = w, .rstd = rstd, .dy = d, .dx = d, .dw = twice});
    EXPECT_TRUE(testing::bits_equal(d, dx));
  }
  std::vector<double> doubled = to_doubles(once);
  for (double& v : doubled) v *= 2;
  EXPECT_TRUE(testing::close(twice, doubled, 1e-6));
}

TEST(RmsNorm, WorksInPlaceAndAccumulatesTheWeightGradient) {
  testing::on_each_device<RmsNorm, RmsNormBackward>(check_in_place);
}

TEST(RmsNorm, RefusesWrongShapes) {
  const Tensor x = Tensor::zeros({2, 4}, DType::kF32), w = Tensor::zeros({3}, DType::kF32);
  EXPECT_THROW(run(RmsNorm{.x = x, .w = w, .y = x}), Error);
  const Tensor four = Tensor::zeros({4}, DType::kF32), narrow = Tensor::zeros({2, 3}, DType::kF32);
  run(RmsNorm{.x = x, .w = four, .y = x});
  EXPECT_THROW(run(RmsNorm{.x = x, .w = four, .y = x, .rstd = {}, .residual = x}), Error);
  EXPECT_THROW(run(RmsNorm{.x = x, .w = four, .y = x, .rstd = {}, .residual = narrow, .sum = x}), Error);
}

}  // namespace
}  // namespace lightmoe
