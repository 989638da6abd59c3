#include "kernels/swiglu.h"

#include <limits>

#include "tests/cases/swiglu.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

struct Oracle {
  std::vector<double> a, dh;
  Oracle(const Tensor& h, const Tensor& da) {
    const std::vector<double> hs = to_doubles(h), das = to_doubles(da);
    const size_t width = static_cast<size_t>(da.dim(1));
    a.resize(das.size()), dh.resize(hs.size());
    for (size_t i = 0; i < das.size(); ++i) {
      const size_t gate = i / width * 2 * width + i % width, up = gate + width;
      const double sigmoid = 1 / (1 + std::exp(-hs[gate]));
      a[i] = hs[gate] * sigmoid * hs[up];
      dh[gate] = das[i] * hs[up] * sigmoid * (1 + hs[gate] * (1 - sigmoid));
      dh[up] = das[i] * hs[gate] * sigmoid;
    }
  }
};

void check_case(const cases::SwiGluCase& c, DType dtype) {
  SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << c.rows << " x " << c.width);
  const Tensor h = random_tensor({c.rows, 2 * c.width}, dtype, 1, 3.0), da = random_tensor({c.rows, c.width}, dtype, 2);
  const Oracle oracle(h, da);
  // Fewer than ten roundings in the compute type (the exponential is good to two), one into the result.
  const double tolerance = testing::unit_roundoff(dtype) + 10 * (dtype == DType::kF64 ? 0x1p-53 : 0x1p-24);
  const Guarded a({c.rows, c.width}, dtype), again({c.rows, c.width}, dtype), dh({c.rows, 2 * c.width}, dtype);
  run(SwiGlu{.h = h, .a = a.tensor()});
  EXPECT_TRUE(testing::close(a.tensor(), oracle.a, tolerance));
  run(SwiGluBackward{.h = h, .da = da, .dh = dh.tensor(), .a = again.tensor()});
  EXPECT_TRUE(testing::close(dh.tensor(), oracle.dh, tolerance));
  EXPECT_TRUE(testing::bits_equal(again.tensor(), a.tensor()));
}

TEST(SwiGlu, MatchesTheEquation) {
  testing::on_each_device<SwiGlu, SwiGluBackward>([] {
    for (const auto& c : cases::swiglu) {
      for (const DType dtype : testing::floating_dtypes()) check_case(c, dtype);
    }
  });
}

TEST(SwiGlu, GradientCheck) {
  const Tensor h = random_tensor({3, 10}, DType::kF64, 3), da = random_tensor({3, 5}, DType::kF64, 4);
  const Tensor a = Tensor::empty({3, 5}, DType::kF64), dh = Tensor::empty({3, 10}, DType::kF64);
  run(SwiGluBackward{.h = h, .da = da, .dh = dh});
  EXPECT_TRUE(testing::gradient_matches(
      [&] {
        run(SwiGlu{.h = h, .a = a});
        double sum = 0;
        for (int64_t i = 0; i < a.numel(); ++i) sum += a.data<double>()[i] * da.data<double>()[i];
        return sum;
      },
      h, dh));
}

void check_in_place() {
  const Tensor h = random_tensor({9, 2 * 77}, DType::kF32, 5), da = random_tensor({9, 77}, DType::kF32, 6);
  const Tensor dh = Tensor::empty({9, 2 * 77}, DType::kF32), a = Tensor::empty({9, 77}, DType::kF32);
  run(SwiGluBackward{.h = h, .da = da, .dh = dh, .a = a});
  const Tensor h_in_place = h.clone(), da_in_place = da.clone();
  run(SwiGluBackward{.h = h_in_place, .da = da_in_place, .dh = h_in_place, .a = da_in_place});
  EXPECT_TRUE(testing::bits_equal(h_in_place, dh));
  EXPECT_TRUE(testing::bits_equal(da_in_place, a));
}

TEST(SwiGlu, BackwardWorksInPlace) { testing::on_each_device<SwiGluBackward>(check_in_place); }

// Far out silu is 0 or the identity, never NaN.
void check_saturation() {
  const Tensor h = Tensor::from<float>({-200, 200, -1e30f, 1e30f, 1, 1, 1, 1}, {1, 8});
  const Tensor da = Tensor::from<float>({1, 1, 1, 1}, {1, 4});
  const Guarded a({1, 4}, DType::kF32), dh({1, 8}, DType::kF32);
  run(SwiGlu{.h = h, .a = a.tensor()});
  EXPECT_TRUE(testing::close(a.tensor(), {0, 200, 0, static_cast<double>(1e30f)}, 0));
  run(SwiGluBackward{.h = h, .da = da, .dh = dh.tensor()});
  EXPECT_TRUE(testing::close(dh.tensor(), {0, 1, 0, 1, 0, 200, 0, static_cast<double>(1e30f)}, 0));
}

TEST(SwiGlu, SaturatesCleanly) { testing::on_each_device<SwiGlu, SwiGluBackward>(check_saturation); }

TEST(SwiGlu, RefusesWrongShapes) {
  const Tensor h = Tensor::zeros({2, 6}, DType::kF32), a = Tensor::zeros({2, 2}, DType::kF32);
  EXPECT_THROW(run(SwiGlu{.h = h, .a = a}), Error);
  EXPECT_THROW(run(SwiGlu{.h = Tensor::zeros({2, 5}, DType::kF32), .a = a}), Error);
}

}  // namespace
}  // namespace lightmoe
