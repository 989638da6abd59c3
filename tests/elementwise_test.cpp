#include "kernels/elementwise.h"

#include <limits>

#include "tests/cases/elementwise.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

// Two roundings in the compute type and one when the result is stored.
double tolerance_of(DType dtype) {
  const double compute = dtype == DType::kF64 ? 0x1p-53 : 0x1p-24;
  return 2 * compute + testing::unit_roundoff(dtype);
}

// |terms| bounds the magnitude of what is added, whose rounding errors survive a cancellation.
void expect_close(const Tensor& actual, const std::vector<double>& expected, DType dtype, double terms = 4) {
  EXPECT_TRUE(testing::close(actual, expected, tolerance_of(dtype), 2 * tolerance_of(dtype) * terms));
}

void check_add_axpy_scale() {
  for (const int64_t n : cases::elementwise) {
    for (const DType dtype : testing::floating_dtypes()) {
      SCOPED_TRACE(::testing::Message() << n << " " << name_of(dtype));
      const Tensor a = random_tensor({n}, dtype, 1), b = random_tensor({n}, dtype, 2);
      const std::vector<double> as = to_doubles(a), bs = to_doubles(b);
      std::vector<double> sum(as), scaled(as), axpy(bs);
      for (size_t i = 0; i < as.size(); ++i) sum[i] += bs[i], scaled[i] *= -1.75, axpy[i] += 0.375 * as[i];
      const Guarded y({n}, dtype), z({n}, dtype), w({n}, dtype);
      run(Add{.a = a, .b = b, .y = y.tensor()});
      expect_close(y.tensor(), sum, dtype);
      run(Scale{.alpha = -1.75, .x = a, .y = z.tensor()});
      expect_close(z.tensor(), scaled, dtype);
      w.tensor().copy_from(b);
      run(Axpy{.alpha = 0.375, .x = a, .y = w.tensor()});
      expect_close(w.tensor(), axpy, dtype);
    }
  }
}

TEST(Elementwise, AddAxpyScale) { testing::on_each_device<Add, Axpy, Scale>(check_add_axpy_scale); }

void check_axpy_types() {
  for (const DType from : testing::floating_dtypes()) {
    for (const DType to : testing::floating_dtypes()) {
      const Tensor x = random_tensor({1001}, from, 3), y = random_tensor({1001}, to, 4);
      std::vector<double> expected = to_doubles(y);
      const std::vector<double> xs = to_doubles(x);
      for (size_t i = 0; i < xs.size(); ++i) expected[i] += 0.3 * xs[i];
      run(Axpy{.alpha = 0.3, .x = x, .y = y});
      expect_close(y, expected, to);
    }
  }
}

TEST(Elementwise, AxpyMixesTypes) { testing::on_each_device<Axpy>(check_axpy_types); }

void check_in_place() {
  const Tensor a = random_tensor({5000}, DType::kF32, 5), b = random_tensor({5000}, DType::kF32, 6);
  const Tensor y = Tensor::empty({5000}, DType::kF32);
  const auto in_place = [&](const auto& op, const auto& op_on) {
    run(op);
    const Tensor copy = a.clone();
    run(op_on(copy));
    EXPECT_TRUE(testing::bits_equal(copy, y));
  };
  in_place(Add{.a = a, .b = b, .y = y}, [&](const Tensor& c) { return Add{.a = c, .b = b, .y = c}; });
  in_place(Scale{.alpha = 3, .x = a, .y = y}, [](const Tensor& c) { return Scale{.alpha = 3, .x = c, .y = c}; });
  in_place(Clamp{.limit = 0.5, .x = a, .y = y}, [](const Tensor& c) { return Clamp{.limit = 0.5, .x = c, .y = c}; });
  in_place(ClampBackward{.limit = 0.5, .x = a, .dy = b, .dx = y},
           [&](const Tensor& c) { return ClampBackward{.limit = 0.5, .x = c, .dy = b, .dx = c}; });
  in_place(Silu{.x = a, .y = y}, [](const Tensor& c) { return Silu{.x = c, .y = c}; });
  in_place(SiluBackward{.x = b, .dy = a, .dx = y},
           [&](const Tensor& c) { return SiluBackward{.x = b, .dy = c, .dx = c}; });
  in_place(Blend{.beta = 0.3, .a = a, .b = b, .y = y},
           [&](const Tensor& c) { return Blend{.beta = 0.3, .a = c, .b = b, .y = c}; });
}

TEST(Elementwise, OutputsMayBeInputs) {
  testing::on_each_device<Add, Scale, Clamp, ClampBackward, Silu, SiluBackward, Blend>(check_in_place);
}

void check_clamp_at_the_boundary() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const float above = std::nextafter(0.7f, 1.0f);
  const Tensor x = Tensor::from<float>({-infinity, -above, -0.7f, -0.0f, 0.7f, above, infinity, nan}, {8});
  const Tensor dy = Tensor::from<float>({1, 2, 3, 4, 5, 6, 7, 8}, {8});
  const Guarded y({8}, DType::kF32), dx({8}, DType::kF32);
  const double limit = static_cast<double>(0.7f);
  run(Clamp{.limit = limit, .x = x, .y = y.tensor()});
  EXPECT_TRUE(testing::close(y.tensor(), {-limit, -limit, -limit, 0, limit, limit, limit, nan}, 0));
  EXPECT_TRUE(std::isnan(to_doubles(y.tensor())[7]));
  run(ClampBackward{.limit = limit, .x = x, .dy = dy, .dx = dx.tensor()});
  EXPECT_TRUE(testing::close(dx.tensor(), {0, 0, 3, 4, 5, 0, 0, 0}, 0));
}

TEST(Elementwise, ClampIsExactAtTheBoundaryAndKeepsNaN) {
  testing::on_each_device<Clamp, ClampBackward>(check_clamp_at_the_boundary);
}

void check_clamp() {
  for (const int64_t n : cases::elementwise) {
    for (const DType dtype : testing::floating_dtypes()) {
      const Tensor x = random_tensor({n}, dtype, 7), dy = random_tensor({n}, dtype, 8);
      const std::vector<double> xs = to_doubles(x);
      std::vector<double> clamped(xs), gradient = to_doubles(dy);
      for (size_t i = 0; i < xs.size(); ++i) {
        clamped[i] = std::min(std::max(xs[i], -0.5), 0.5);
        if (std::abs(xs[i]) > 0.5) gradient[i] = 0;
      }
      const Guarded y({n}, dtype), dx({n}, dtype);
      run(Clamp{.limit = 0.5, .x = x, .y = y.tensor()});
      EXPECT_TRUE(testing::close(y.tensor(), clamped, 0));
      run(ClampBackward{.limit = 0.5, .x = x, .dy = dy, .dx = dx.tensor()});
      EXPECT_TRUE(testing::close(dx.tensor(), gradient, 0));
    }
  }
}

TEST(Elementwise, ClampMatchesTheEquation) { testing::on_each_device<Clamp, ClampBackward>(check_clamp); }

void check_blend() {
  for (const DType a_type : {DType::kF32, DType::kBF16}) {
    for (const DType b_type : {DType::kF32, DType::kBF16}) {
      for (const DType y_type : {DType::kF32, DType::kBF16}) {
        const Tensor a = random_tensor({1037}, a_type, 9), b = random_tensor({1037}, b_type, 10);
        for (const double beta : {0.0, 0.25, 0.9, 1.0}) {
          const Guarded y({1037}, y_type);
          run(Blend{.beta = beta, .a = a, .b = b, .y = y.tensor()});
          std::vector<double> expected = to_doubles(b);
          const std::vector<double> as = to_doubles(a);
          for (size_t i = 0; i < as.size(); ++i) expected[i] = beta * as[i] + (1 - beta) * expected[i];
          if (beta == 0)
            EXPECT_TRUE(testing::bits_equal(y.tensor(), b.to(y_type)));
          else if (beta == 1)
            EXPECT_TRUE(testing::bits_equal(y.tensor(), a.to(y_type)));
          else
            expect_close(y.tensor(), expected, y_type);
        }
      }
    }
  }
}

TEST(Elementwise, BlendMixesTypesAndIsExactAtItsEnds) { testing::on_each_device<Blend>(check_blend); }

// At beta 0 an original that overflowed or is gone must not leak in.
void check_blend_at_zero() {
  const Tensor a = Tensor::from<float>({std::numeric_limits<float>::quiet_NaN()}, {1}),
               b = Tensor::from<float>({2}, {1});
  const Tensor y = Tensor::zeros({1}, DType::kF32);
  run(Blend{.beta = 0, .a = a, .b = b, .y = y});
  EXPECT_EQ(to_doubles(y)[0], 2);
}

TEST(Elementwise, BlendAtZeroDoesNotReadTheOriginal) { testing::on_each_device<Blend>(check_blend_at_zero); }

// The slope's magnitude is at most 1.1, that of what it is made of 2; sigmoid and exponential have a rounding or two of their own.
void check_silu() {
  for (const int64_t n : cases::elementwise) {
    for (const DType dtype : testing::floating_dtypes()) {
      SCOPED_TRACE(::testing::Message() << n << " " << name_of(dtype));
      const Tensor x = random_tensor({n}, dtype, 13, 3), dy = random_tensor({n}, dtype, 14);
      const std::vector<double> xs = to_doubles(x);
      std::vector<double> value(xs), gradient = to_doubles(dy);
      for (size_t i = 0; i < xs.size(); ++i) {
        const double s = 1 / (1 + std::exp(-xs[i]));
        value[i] = xs[i] * s, gradient[i] *= s + xs[i] * s * (1 - s);
      }
      const Guarded y({n}, dtype), dx({n}, dtype);
      run(Silu{.x = x, .y = y.tensor()});
      expect_close(y.tensor(), value, dtype, 16);
      run(SiluBackward{.x = x, .dy = dy, .dx = dx.tensor()});
      expect_close(dx.tensor(), gradient, dtype, 16);
    }
  }
}

TEST(Elementwise, SiluMatchesTheEquation) { testing::on_each_device<Silu, SiluBackward>(check_silu); }

// silu(0) = 0 with slope 1/2; far to the left it vanishes instead of overflowing, NaN stays.
void check_silu_at_the_ends() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Tensor x = Tensor::from<float>({0, -200, 200, nan}, {4}), dy = Tensor::from<float>({4, 4, 4, 4}, {4});
  const Guarded y({4}, DType::kF32), dx({4}, DType::kF32);
  run(Silu{.x = x, .y = y.tensor()});
  run(SiluBackward{.x = x, .dy = dy, .dx = dx.tensor()});
  const std::vector<double> ys = to_doubles(y.tensor()), dxs = to_doubles(dx.tensor());
  EXPECT_EQ(ys[0], 0);
  EXPECT_EQ(dxs[0], 2);
  EXPECT_NEAR(ys[1], 0, 1e-30);
  EXPECT_NEAR(dxs[1], 0, 1e-30);
  EXPECT_EQ(ys[2], 200);
  EXPECT_EQ(dxs[2], 4);
  EXPECT_TRUE(std::isnan(ys[3]) && std::isnan(dxs[3]));
}

TEST(Elementwise, SiluAtItsEnds) { testing::on_each_device<Silu, SiluBackward>(check_silu_at_the_ends); }

TEST(Elementwise, IsTheSameOnAnyThreads) {
  const Tensor a = random_tensor({100003}, DType::kF32, 11), b = random_tensor({100003}, DType::kF32, 12);
  EXPECT_TRUE(testing::same_on_any_threads([&] {
    const Tensor y = Tensor::empty({100003}, DType::kF32);
    run(Blend{.beta = 0.3, .a = a, .b = b, .y = y});
    run(Axpy{.alpha = 0.7, .x = b, .y = y});
    return y;
  }));
}

TEST(Elementwise, RefusesWrongArguments) {
  const Tensor a = Tensor::zeros({3}, DType::kF32), b = Tensor::zeros({4}, DType::kF32),
               c = Tensor::zeros({3}, DType::kF64);
  EXPECT_THROW(run(Add{.a = a, .b = b, .y = a}), Error);
  EXPECT_THROW(run(Scale{.alpha = 1, .x = c, .y = a}), Error);
  EXPECT_THROW(run(Blend{.beta = 1.5, .a = a, .b = a, .y = a}), Error);
  EXPECT_THROW(run(Clamp{.limit = -1, .x = a, .y = a}), Error);
  EXPECT_THROW(run(Silu{.x = b, .y = a}), Error);
  EXPECT_THROW(run(SiluBackward{.x = a, .dy = c, .dx = a}), Error);
}

}  // namespace
}  // namespace lightmoe
