#include "kernels/activation.h"

#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

// f and f' of one number, the definitions.
std::pair<double, double> at(Activation kind, double x) {
  switch (kind) {
    case Activation::kGelu: {
      const double phi = .5 * std::erfc(-x / std::sqrt(2.));
      return {x * phi, phi + x * std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.))};
    }
    case Activation::kTanh:
      return {std::tanh(x), 1 / std::pow(std::cosh(x), 2)};
    case Activation::kSigmoid:
      return {1 / (1 + std::exp(-x)), std::exp(-x) / std::pow(1 + std::exp(-x), 2)};
    case Activation::kOpen:
      return {x > .5, 0};
    case Activation::kIsZero:
      return {x == 0, 0};
    case Activation::kAbs:
      return {std::abs(x), x == 0 ? 0 : std::copysign(1., x)};
    case Activation::kSqrt:
      return {std::sqrt(x), x == 0 ? 0 : .5 / std::sqrt(x)};
  }
  return {};
}

void check_case(Activation kind, int64_t count, DType dtype) {
  SCOPED_TRACE(::testing::Message() << "kind " << static_cast<int>(kind) << ", " << count << " " << name_of(dtype));
  const Tensor x = random_tensor({count}, dtype, 1, 2), dy = random_tensor({count}, dtype, 2);
  if (kind == Activation::kSqrt) run(Activate{.kind = Activation::kAbs, .x = x, .y = x});
  if (count > 2) x.slice(1, 2).fill_zero();
  const Guarded y({count}, dtype), dx({count}, dtype);
  run(Activate{.kind = kind, .x = x, .y = y.tensor()});
  run(ActivateBackward{.kind = kind, .x = x, .dy = dy, .dx = dx.tensor()});
  std::vector<double> expected, gradient;
  const std::vector<double> in = to_doubles(x), d = to_doubles(dy);
  for (size_t i = 0; i < in.size(); ++i) {
    expected.push_back(at(kind, in[i]).first);
    gradient.push_back(at(kind, in[i]).second * d[i]);
  }
  // A function to a few ulp of the type it is computed in, of values and slopes of order one (relative to the largest, as that of a square
  // root near 0 is), rounded to dtype; 1 - y * y and 1 + erf cancel, so the error is absolute.
  const double tolerance = 8 * testing::unit_roundoff(dtype);
  EXPECT_TRUE(testing::close(y.tensor(), expected, tolerance, tolerance));
  EXPECT_TRUE(testing::close(dx.tensor(), gradient, tolerance, tolerance));
  const Tensor in_place = x.clone();
  run(Activate{.kind = kind, .x = in_place, .y = in_place});
  EXPECT_TRUE(testing::bits_equal(in_place, y.tensor()));
}

void check_cases() {
  for (const Activation kind :
       {Activation::kGelu, Activation::kTanh, Activation::kSigmoid, Activation::kOpen, Activation::kIsZero}) {
    for (const int64_t count : {0, 1, 3, 64, 1027}) {
      for (const DType dtype : testing::floating_dtypes()) check_case(kind, count, dtype);
    }
  }
}

TEST(Activation, MatchesTheDefinition) { testing::on_each_device<Activate, ActivateBackward>(check_cases); }

void check_ends() {
  const Tensor x = Tensor::from<float>({-100, 100, -0.0f, .5f}, {4}), y = Tensor::empty({4}, DType::kF32);
  run(Activate{.kind = Activation::kGelu, .x = x, .y = y});
  EXPECT_TRUE(testing::close(y.slice(0, 3), {0, 100, 0}, 0));
  run(Activate{.kind = Activation::kSigmoid, .x = x, .y = y});
  EXPECT_TRUE(testing::close(y.slice(0, 3), {0, 1, .5}, 1e-7, 1e-30));
  run(Activate{.kind = Activation::kIsZero, .x = x, .y = y});
  EXPECT_TRUE(testing::close(y, {0, 0, 1, 0}, 0));
  run(Activate{.kind = Activation::kOpen, .x = x, .y = y});
  EXPECT_TRUE(testing::close(y, {0, 1, 0, 0}, 0));  // the threshold itself is closed
}

TEST(Activation, Ends) { testing::on_each_device<Activate>(check_ends); }

}  // namespace
}  // namespace lightmoe
