#include "kernels/masked_mean.h"

#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::to_doubles;

// Rows that sum to one, every third number 0 (a removed slot).
Tensor some_probs(int64_t rows, int64_t slots, DType dtype, uint64_t seed) {
  Philox random(seed);
  const Tensor p = Tensor::empty({rows, slots}, DType::kF64, DeviceKind::kCpu);
  for (int64_t t = 0; t < rows; ++t) {
    double sum = 0;
    double* row = p.data<double>() + t * slots;
    for (int64_t e = 0; e < slots; ++e) sum += row[e] = e % 3 == 1 ? 0 : .01 + std::abs(random.normal());
    for (int64_t e = 0; e < slots; ++e) row[e] /= sum;
  }
  return p.to(dtype).on(default_device());
}

void check_case(int64_t rows, bool masked, DType dtype) {
  SCOPED_TRACE(::testing::Message() << rows << " rows, " << name_of(dtype) << (masked ? ", masked" : ""));
  const std::vector<int64_t> slots = {1, 7, 64};
  RouterEntropy op{.probs = {}, .mask = {}, .scale = .5, .loss = {}, .dprobs = {}};
  std::vector<uint8_t> keep(static_cast<size_t>(rows), 1);
  for (size_t t = 0; masked && t < keep.size(); ++t) keep[t] = t % 3 != 0;
  if (masked) op.mask = Tensor::from(keep, {rows});
  std::vector<std::unique_ptr<Guarded>> gradients;
  for (size_t l = 0; l < slots.size(); ++l) {
    op.probs.push_back(some_probs(rows, slots[l], dtype, l + 1));
    gradients.push_back(std::make_unique<Guarded>(Shape{rows, slots[l]}, dtype));
    op.dprobs.push_back(l == 1 ? Tensor() : gradients.back()->tensor());
  }
  const Guarded loss({1}, DType::kF64);
  op.loss = loss.tensor();
  run(op);

  double sum = 0;
  const auto counted = static_cast<double>(std::count(keep.begin(), keep.end(), uint8_t{1}));
  const double terms = std::max(1.0, counted * static_cast<double>(slots.size()));
  // A logarithm to an ulp, of numbers down to 1e-3: errors of a few units in the last place of 7.
  const double tolerance = 8 * testing::unit_roundoff(dtype);
  for (size_t l = 0; l < slots.size(); ++l) {
    const std::vector<double> p = to_doubles(op.probs[l]);
    std::vector<double> expected(p.size(), 0.0);
    for (size_t i = 0; i < p.size(); ++i) {
      if (!keep[i / static_cast<size_t>(slots[l])] || p[i] == 0) continue;
      sum -= p[i] * std::log(p[i]);
      expected[i] = -.5 / terms * (std::log(p[i]) + 1);
    }
    if (op.dprobs[l].defined()) {
      EXPECT_TRUE(testing::close(op.dprobs[l], expected, tolerance, tolerance / terms));
    }
  }
  const double of_sum = tolerance + testing::sum_tolerance(DType::kF64, rows * 72);
  EXPECT_TRUE(testing::close(loss.tensor(), {sum / terms}, of_sum, of_sum));
  op.dprobs.clear();
  run(op);
  EXPECT_TRUE(testing::close(loss.tensor(), {sum / terms}, of_sum, of_sum));
}

void check_cases() {
  for (const int64_t rows : {0, 1, 31, 200, 700}) {
    for (const bool masked : {false, true}) {
      check_case(rows, masked, DType::kF32);
      check_case(rows, masked, DType::kBF16);
      if (default_device() == DeviceKind::kCpu) check_case(rows, masked, DType::kF64);
    }
  }
}

TEST(RouterEntropy, MatchesTheEquation) { testing::on_each_device<RouterEntropy>(check_cases); }

// All sure: nothing; all even over two: ln 2. No token counts: 0, and no gradient.
void check_by_hand() {
  const Tensor loss = Tensor::empty({1}, DType::kF64), d = Tensor::empty({2, 2}, DType::kF32);
  RouterEntropy op{.probs = {Tensor::from<float>({1, 0, .5, .5}, {2, 2})}, .mask = {}, .loss = loss, .dprobs = {d}};
  run(op);
  EXPECT_TRUE(testing::close(loss, {std::log(2.) / 2}, 1e-7));
  EXPECT_TRUE(testing::close(d, {-.5, 0, (std::log(2.) - 1) / 2, (std::log(2.) - 1) / 2}, 1e-6));
  op.mask = Tensor::from<uint8_t>({0, 0}, {2});
  run(op);
  EXPECT_TRUE(testing::close(loss, {0}, 0));
  EXPECT_TRUE(testing::close(d, {0, 0, 0, 0}, 0));
}

TEST(RouterEntropy, ByHand) { testing::on_each_device<RouterEntropy>(check_by_hand); }

// Two tensors of two tokens with two rows each, the second token is left out: (mean of .1 .3 .5 .7 + mean of 1 0 0 0) / 2.
void check_mean() {
  const Tensor a = Tensor::from<float>({.1f, .3f, .5f, .7f, 9, 9, 9, 9}, {4, 2}),
               b = Tensor::from<float>({1, 0, 9, 9}, {4, 1}), mask = Tensor::from<uint8_t>({1, 0}, {2}),
               loss = Tensor::empty({1}, DType::kF64);
  const Guarded da(a.shape(), DType::kF32), db(b.shape(), DType::kF32);
  MaskedMean op{.x = {a, b}, .mask = mask, .scale = 4, .loss = loss, .dx = {da.tensor(), db.tensor()}};
  run(op);
  EXPECT_TRUE(testing::close(loss, {(.4 + .5) / 2}, 1e-7));
  EXPECT_TRUE(testing::close(da.tensor(), {.5, .5, .5, .5, 0, 0, 0, 0}, 1e-7));
  EXPECT_TRUE(testing::close(db.tensor(), {1, 1, 0, 0}, 1e-7));
  op.mask = {}, op.dx.clear();
  run(op);
  EXPECT_TRUE(testing::close(loss, {((1.6 + 36) / 8 + 19. / 4) / 2}, 1e-7));
}

TEST(MaskedMean, ByHand) { testing::on_each_device<MaskedMean>(check_mean); }

TEST(MaskedMean, RefusesAMaskThatDoesNotDivide) {
  const Tensor x = Tensor::zeros({3, 2}, DType::kF32);
  const MaskedMean op{
      .x = {x}, .mask = Tensor::from<uint8_t>({1, 0}, {2}), .loss = Tensor::zeros({1}, DType::kF64), .dx = {}};
  EXPECT_THROW(run(op), Error);
}

}  // namespace
}  // namespace lightmoe
