#include "kernels/rope.h"

#include "tests/cases/rope.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

Tensor positions_from(int32_t first, int64_t count) {
  std::vector<int32_t> positions(static_cast<size_t>(count));
  for (size_t t = 0; t < positions.size(); ++t) positions[t] = first + static_cast<int32_t>(t);
  return Tensor::from(positions, {count});
}

// Complex numbers (x[i], x[i + half]) multiplied by e^(i angle).
std::vector<double> oracle(const Tensor& x, const Tensor& positions, int64_t head_dim, double theta, double direction) {
  const std::vector<double> xs = to_doubles(x), at = to_doubles(positions);
  std::vector<double> y(xs.size());
  const int64_t half = head_dim / 2, width = x.dim(1);
  for (int64_t element = 0; element < x.numel(); ++element) {
    const int64_t i = element % head_dim;
    if (i >= half) continue;
    const double inverse_frequency = std::pow(theta, 2 * static_cast<double>(i) / static_cast<double>(head_dim));
    const double angle = direction * at[static_cast<size_t>(element / width)] / inverse_frequency;
    const size_t low = static_cast<size_t>(element), high = static_cast<size_t>(element + half);
    y[low] = xs[low] * std::cos(angle) - xs[high] * std::sin(angle);
    y[high] = xs[high] * std::cos(angle) + xs[low] * std::sin(angle);
  }
  return y;
}

void check_cases() {
  for (const auto& c : cases::rope) {
    for (const DType dtype : testing::floating_dtypes()) {
      SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << c.tokens << " x " << c.heads << " x "
                                        << c.head_dim);
      const Tensor x = random_tensor({c.tokens, c.heads * c.head_dim}, dtype, 1);
      const Tensor positions = positions_from(c.first_position, c.tokens);
      const Guarded y({c.tokens, c.heads * c.head_dim}, dtype);
      // Angles up to 4096 radians carry a relative rounding of 2^-53; beside it the roundings of cos, sin, products and sum.
      const double tolerance = testing::unit_roundoff(dtype) + 6 * (dtype == DType::kF64 ? 0x1p-53 * 4096 : 0x1p-24);
      run(Rope{.x = x, .positions = positions, .head_dim = c.head_dim, .theta = 20000, .y = y.tensor()});
      EXPECT_TRUE(testing::close(y.tensor(), oracle(x, positions, c.head_dim, 20000, 1), tolerance));
      run(Rope{.x = x, .positions = positions, .head_dim = c.head_dim, .inverse = true, .y = y.tensor()});
      EXPECT_TRUE(testing::close(y.tensor(), oracle(x, positions, c.head_dim, 10000, -1), tolerance));
    }
  }
}

TEST(Rope, MatchesTheEquation) { testing::on_each_device<Rope>(check_cases); }

// The rotation is linear and orthogonal: its gradient is the inverse rotation.
TEST(Rope, GradientCheck) {
  const Tensor x = random_tensor({3, 12}, DType::kF64, 2), dy = random_tensor({3, 12}, DType::kF64, 3);
  const Tensor positions = Tensor::from<int32_t>({5, 0, 2}, {3});
  const Tensor y = Tensor::empty({3, 12}, DType::kF64), dx = Tensor::empty({3, 12}, DType::kF64);
  run(Rope{.x = dy, .positions = positions, .head_dim = 6, .inverse = true, .y = dx});
  EXPECT_TRUE(testing::gradient_matches(
      [&] {
        run(Rope{.x = x, .positions = positions, .head_dim = 6, .y = y});
        double sum = 0;
        for (int64_t i = 0; i < y.numel(); ++i) sum += y.data<double>()[i] * dy.data<double>()[i];
        return sum;
      },
      x, dx));
}

void check_in_place() {
  const Tensor x = random_tensor({7, 64}, DType::kF32, 4), y = Tensor::empty({7, 64}, DType::kF32);
  const Tensor positions = positions_from(3, 7);
  run(Rope{.x = x, .positions = positions, .head_dim = 32, .y = y});
  const Tensor in_place = x.clone();
  run(Rope{.x = in_place, .positions = positions, .head_dim = 32, .y = in_place});
  EXPECT_TRUE(testing::bits_equal(in_place, y));
  run(Rope{.x = x.slice(0, 1), .positions = Tensor::from<int32_t>({0}, {1}), .head_dim = 32, .y = y.slice(0, 1)});
  EXPECT_TRUE(testing::bits_equal(y.slice(0, 1), x.slice(0, 1)));
}

TEST(Rope, WorksInPlaceAndDoesNothingAtPositionZero) { testing::on_each_device<Rope>(check_in_place); }

void check_rows() {
  const Tensor x = random_tensor({9, 64}, DType::kF32, 5), all = Tensor::empty({9, 64}, DType::kF32);
  const Tensor one = Tensor::empty({1, 64}, DType::kF32), positions = positions_from(0, 9);
  run(Rope{.x = x, .positions = positions, .head_dim = 64, .y = all});
  for (int64_t t = 0; t < 9; ++t) {
    run(Rope{.x = x.slice(t, t + 1), .positions = positions.slice(t, t + 1), .head_dim = 64, .y = one});
    EXPECT_TRUE(testing::bits_equal(one, all.slice(t, t + 1)));
  }
}

TEST(Rope, ARowDoesNotDependOnTheOthers) { testing::on_each_device<Rope>(check_rows); }

TEST(Rope, RefusesWrongArguments) {
  const Tensor x = Tensor::zeros({2, 12}, DType::kF32), positions = positions_from(0, 2);
  EXPECT_THROW(run(Rope{.x = x, .positions = positions, .head_dim = 5, .y = x}), Error);
  EXPECT_THROW(run(Rope{.x = x, .positions = positions, .head_dim = 8, .y = x}), Error);
  EXPECT_THROW(run(Rope{.x = x, .positions = positions_from(0, 3), .head_dim = 4, .y = x}), Error);
}

}  // namespace
}  // namespace lightmoe
