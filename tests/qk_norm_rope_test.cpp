#include "kernels/qk_norm_rope.h"

#include "tests/cases/qk_norm_rope.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

constexpr double kEps = 1e-5, kTheta = 20000;

Tensor positions_from(int32_t first, int64_t count) {
  std::vector<int32_t> positions(static_cast<size_t>(count));
  for (size_t t = 0; t < positions.size(); ++t) positions[t] = first + static_cast<int32_t>(t);
  return Tensor::from(positions, {count});
}

// Complex numbers (x[i], x[i + half]) of each head multiplied by e^(i direction angle).
void turn(std::vector<double>& row, int64_t head_dim, double position, double direction) {
  const size_t half = static_cast<size_t>(head_dim / 2);
  for (size_t head = 0; head < row.size(); head += 2 * half) {
    for (size_t i = 0; i < half; ++i) {
      const double inverse_frequency = std::pow(kTheta, static_cast<double>(i) / static_cast<double>(half));
      const double angle = direction * position / inverse_frequency;
      const double low = row[head + i], high = row[head + half + i];
      row[head + i] = low * std::cos(angle) - high * std::sin(angle);
      row[head + half + i] = high * std::cos(angle) + low * std::sin(angle);
    }
  }
}

// The equations in double, one row at a time.
struct Oracle {
  std::vector<double> y, rstd, dx, dw;
  double largest_y = 0, largest_term = 0;  // largest_term: of the two that dx subtracts
  Oracle(const Tensor& x, const Tensor& w, const Tensor& dy, const Tensor& positions, int64_t head_dim, double limit) {
    const std::vector<double> xs = to_doubles(x), ws = to_doubles(w), dys = to_doubles(dy), at = to_doubles(positions);
    const size_t rows = static_cast<size_t>(x.dim(0)), n = static_cast<size_t>(x.dim(1));
    dw.assign(n, 0);
    for (size_t t = 0; t < rows; ++t) {
      std::vector<double> row(n),
          gradient(dys.begin() + static_cast<int64_t>(t * n), dys.begin() + static_cast<int64_t>((t + 1) * n));
      double squares = 0, dot = 0;
      for (size_t i = 0; i < n; ++i) squares += xs[t * n + i] * xs[t * n + i];
      const double r = 1 / std::sqrt(squares / static_cast<double>(n) + kEps);
      rstd.push_back(r);
      turn(gradient, head_dim, at[t], -1);
      for (size_t i = 0; i < n; ++i) {
        const double v = xs[t * n + i] * r * ws[i];
        row[i] = std::clamp(v, -limit, limit);
        if (std::abs(v) > limit) gradient[i] = 0;
        dw[i] += gradient[i] * xs[t * n + i] * r;
        dot += gradient[i] * ws[i] * xs[t * n + i];
      }
      for (size_t i = 0; i < n; ++i) {
        largest_term = std::max(largest_term, std::abs(r * gradient[i] * ws[i]));
        dx.push_back(r * (gradient[i] * ws[i] - xs[t * n + i] * r * r * dot / static_cast<double>(n)));
      }
      turn(row, head_dim, at[t], 1);
      for (const double v : row) largest_y = std::max(largest_y, std::abs(v));
      y.insert(y.end(), row.begin(), row.end());
    }
  }
};

// Queries or keys: what goes in, what comes out, what must.
struct Part {
  Tensor x, w, dy, dw;
  Guarded y, rstd, dx;
  Oracle oracle;
  Part(int64_t tokens, int64_t width, DType dtype, const HeadTurns& turns, double limit, uint64_t seed)
      : x(random_tensor({tokens, width}, dtype, seed)),
        w(random_tensor({width}, dtype, seed + 1)),
        dy(random_tensor({tokens, width}, dtype, seed + 2)),
        dw(Tensor::zeros({width}, accumulator(dtype))),
        y({tokens, width}, dtype),
        rstd({tokens}, accumulator(dtype)),
        dx({tokens, width}, dtype),
        oracle(x, w, dy, turns.positions, turns.head_dim, limit) {}
  static DType accumulator(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }
  QkNormRope::Rows forward() const { return {.x = x, .w = w, .y = y.tensor(), .rstd = rstd.tensor()}; }
  QkNormRopeBackward::Rows backward() const {
    return {.x = x, .w = w, .rstd = rstd.tensor(), .dy = dy, .dx = dx.tensor(), .dw = dw};
  }
  // Beside the sum's own error a value is rounded three times to dtype (normalisation, weight, rotation) and some times in between;
  // angles up to 4096 radians carry a relative rounding of 2^-53.
  void check() const {
    const DType dtype = x.dtype();
    const double angle = dtype == DType::kF64 ? 0x1p-53 * 4096 : 0x1p-24;
    const double tolerance = testing::sum_tolerance(dtype, x.dim(1)) + 3 * testing::unit_roundoff(dtype) + 6 * angle;
    EXPECT_TRUE(testing::close(rstd.tensor(), oracle.rstd, tolerance));
    EXPECT_TRUE(testing::close(y.tensor(), oracle.y, tolerance));
    EXPECT_TRUE(testing::close(dx.tensor(), oracle.dx, 0, 4 * tolerance * oracle.largest_term));
    EXPECT_TRUE(testing::close(dw, oracle.dw, testing::sum_tolerance(dw.dtype(), x.dim(0)) + 4 * tolerance));
  }
};

// No value lies so near the limit that rounding decides on which side it is: that would be a jump of the gradient.
bool near_limit(const Part& part, double limit) {
  for (size_t i = 0; i < part.oracle.y.size(); ++i) {
    const size_t n = static_cast<size_t>(part.x.dim(1));
    const double v = to_doubles(part.x)[i] * part.oracle.rstd[i / n] * to_doubles(part.w)[i % n];
    if (std::abs(std::abs(v) - limit) < 1e-6 * limit) return true;
  }
  return false;
}

void check_case(const cases::QkNormRopeCase& c, DType dtype, double limit) {
  SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << c.tokens << " x (" << c.heads << ", " << c.key_heads
                                    << ") x " << c.head_dim << " limit " << limit);
  const HeadTurns turns{
      .positions = positions_from(c.first_position, c.tokens), .head_dim = c.head_dim, .theta = kTheta};
  const Part q(c.tokens, c.heads * c.head_dim, dtype, turns, limit, 1),
      k(c.tokens, c.key_heads * c.head_dim, dtype, turns, limit, 11);
  run(QkNormRope{.q = q.forward(), .k = k.forward(), .turns = turns, .eps = kEps, .limit = limit});
  run(QkNormRopeBackward{.q = q.backward(), .k = k.backward(), .turns = turns, .limit = limit});
  q.check(), k.check();
}

TEST(QkNormRope, MatchesTheEquation) {
  testing::on_each_device<QkNormRope, QkNormRopeBackward>([] {
    for (const auto& c : cases::qk_norm_rope) {
      for (const DType dtype : testing::floating_dtypes())
        check_case(c, dtype, std::numeric_limits<double>::infinity());
    }
  });
}

// In f32 and f64, where rounding does not move values across the limit.
TEST(QkNormRope, LimitsValuesAndTheirGradients) {
  const double limit = 0.7;
  const HeadTurns turns{.positions = positions_from(2, 13), .head_dim = 8, .theta = kTheta};
  testing::on_each_device<QkNormRope, QkNormRopeBackward>([&] {
    for (const DType dtype : testing::floating_dtypes()) {
      if (dtype == DType::kBF16) continue;
      HeadTurns here = turns;
      here.positions = turns.positions.on(default_device());
      const Part q(13, 48, dtype, here, limit, 1), k(13, 16, dtype, here, limit, 11);
      ASSERT_FALSE(near_limit(q, limit) || near_limit(k, limit));
      run(QkNormRope{.q = q.forward(), .k = k.forward(), .turns = here, .eps = kEps, .limit = limit});
      run(QkNormRopeBackward{.q = q.backward(), .k = k.backward(), .turns = here, .limit = limit});
      q.check(), k.check();
    }
  });
}

TEST(QkNormRope, GradientCheck) {
  const Tensor x = random_tensor({3, 12}, DType::kF64, 2), w = random_tensor({12}, DType::kF64, 3),
               dy = random_tensor({3, 12}, DType::kF64, 4);
  const HeadTurns turns{.positions = Tensor::from<int32_t>({5, 0, 2}, {3}), .head_dim = 6};
  const Tensor y = Tensor::empty({3, 12}, DType::kF64), rstd = Tensor::empty({3}, DType::kF64),
               dx = Tensor::empty({3, 12}, DType::kF64), dw = Tensor::zeros({12}, DType::kF64);
  const auto loss = [&] {
    run(QkNormRope{.q = {.x = x, .w = w, .y = y, .rstd = rstd}, .k = {}, .turns = turns, .limit = 1.1});
    double sum = 0;
    for (int64_t i = 0; i < y.numel(); ++i) sum += y.data<double>()[i] * dy.data<double>()[i];
    return sum;
  };
  loss();
  run(QkNormRopeBackward{
      .q = {.x = x, .w = w, .rstd = rstd, .dy = dy, .dx = dx, .dw = dw}, .k = {}, .turns = turns, .limit = 1.1});
  EXPECT_TRUE(testing::gradient_matches(loss, x, dx));
  EXPECT_TRUE(testing::gradient_matches(loss, w, dw));
}

// y over x, dx over dy, a row by itself, keys left out: always the same bits. dw adds to what is there.
void check_bits() {
  const int64_t tokens = 37, width = 64;
  const HeadTurns turns{.positions = positions_from(3, tokens), .head_dim = 32, .theta = kTheta};
  const double limit = 1.5;
  const Part q(tokens, width, DType::kF32, turns, limit, 1), k(tokens, 32, DType::kF32, turns, limit, 11);
  run(QkNormRope{.q = q.forward(), .k = k.forward(), .turns = turns, .eps = kEps, .limit = limit});
  run(QkNormRopeBackward{.q = q.backward(), .k = k.backward(), .turns = turns, .limit = limit});

  const Tensor in_place = k.x.clone();
  run(QkNormRope{
      .q = {.x = in_place, .w = k.w, .y = in_place, .rstd = {}}, .k = {}, .turns = turns, .eps = kEps, .limit = limit});
  EXPECT_TRUE(testing::bits_equal(in_place, k.y.tensor()));
  for (const int64_t t : {int64_t{0}, int64_t{17}, tokens - 1}) {
    const Tensor one = Tensor::empty({1, width}, DType::kF32);
    const HeadTurns at{.positions = turns.positions.slice(t, t + 1), .head_dim = 32, .theta = kTheta};
    run(QkNormRope{.q = {.x = q.x.slice(t, t + 1), .w = q.w, .y = one, .rstd = {}},
                   .k = {},
                   .turns = at,
                   .eps = kEps,
                   .limit = limit});
    EXPECT_TRUE(testing::bits_equal(one, q.y.tensor().slice(t, t + 1))) << "row " << t;
  }
  const Tensor d = q.dy.clone(), twice = q.dw.clone();
  run(QkNormRopeBackward{.q = {.x = q.x, .w = q.w, .rstd = q.rstd.tensor(), .dy = d, .dx = d, .dw = twice},
                         .k = {.x = k.x,
                               .w = k.w,
                               .rstd = k.rstd.tensor(),
                               .dy = k.dy,
                               .dx = Tensor::empty(k.x.shape(), DType::kF32),
                               .dw = {}},
                         .turns = turns,
                         .limit = limit});
  EXPECT_TRUE(testing::bits_equal(d, q.dx.tensor()));
  std::vector<double> doubled = to_doubles(q.dw);
  for (double& v : doubled) v *= 2;
  EXPECT_TRUE(testing::close(twice, doubled, 1e-6));
}

TEST(QkNormRope, SameBitsInPlaceAndByRows) { testing::on_each_device<QkNormRope, QkNormRopeBackward>(check_bits); }

TEST(QkNormRope, SameBitsOnAnyThreads) {
  const HeadTurns turns{.positions = positions_from(0, 200), .head_dim = 32, .theta = kTheta};
  const Part q(200, 64, DType::kF32, turns, 1.5, 1);
  EXPECT_TRUE(testing::same_on_any_threads([&] {
    const Tensor dw = Tensor::zeros({64}, DType::kF32);
    run(QkNormRope{.q = q.forward(), .k = {}, .turns = turns, .eps = kEps, .limit = 1.5});
    QkNormRopeBackward op{.q = q.backward(), .k = {}, .turns = turns, .limit = 1.5};
    op.q.dw = dw;
    run(op);
    return dw;
  }));
}

TEST(QkNormRope, RefusesWrongArguments) {
  const Tensor x = Tensor::zeros({2, 12}, DType::kF32), w = Tensor::zeros({12}, DType::kF32);
  const auto with = [&](int64_t head_dim, const Tensor& positions, const Tensor& weight, double limit) {
    run(QkNormRope{.q = {.x = x, .w = weight, .y = x, .rstd = {}},
                   .k = {},
                   .turns = {.positions = positions, .head_dim = head_dim},
                   .limit = limit});
  };
  const Tensor two = positions_from(0, 2);
  with(6, two, w, 1);
  EXPECT_THROW(with(5, two, w, 1), Error);
  EXPECT_THROW(with(8, two, w, 1), Error);
  EXPECT_THROW(with(6, positions_from(0, 3), w, 1), Error);
  EXPECT_THROW(with(6, two, Tensor::zeros({6}, DType::kF32), 1), Error);
  EXPECT_THROW(with(6, two, w, 0), Error);
}

}  // namespace
}  // namespace lightmoe
