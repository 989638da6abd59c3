#include "kernels/cross_entropy.h"

#include "tests/cases/cross_entropy.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

constexpr int32_t kIgnored = -100;

// Every fifth row is ignored, and the last one.
Tensor some_labels(int64_t rows, int64_t vocabulary) {
  Philox random(9, 9);
  std::vector<int32_t> labels;
  for (int64_t t = 0; t < rows; ++t) {
    const bool ignored = t % 5 == 3 || (t > 0 && t == rows - 1);
    labels.push_back(ignored ? kIgnored : static_cast<int32_t>(random.below(static_cast<uint64_t>(vocabulary))));
  }
  return Tensor::from(labels, {rows});
}

struct Oracle {
  double loss = 0;
  std::vector<double> dx, dw, log_prob, lse, argmax;
  Oracle(const Tensor& x, const Tensor& w, const Tensor& labels, double scale) {
    const std::vector<double> xs = to_doubles(x), ws = to_doubles(w), label_of = to_doubles(labels);
    const size_t rows = static_cast<size_t>(x.dim(0)), d = static_cast<size_t>(x.dim(1));
    const size_t v = static_cast<size_t>(w.dim(0));
    dx.assign(rows * d, 0), dw.assign(v * d, 0), log_prob.assign(rows, 0), lse.assign(rows, 0), argmax.assign(rows, 0);
    for (size_t t = 0; t < rows; ++t) {
      const int32_t label = static_cast<int32_t>(label_of[t]);
      if (label == kIgnored) continue;
      std::vector<double> logits(v, 0);
      for (size_t j = 0; j < v; ++j) {
        for (size_t i = 0; i < d; ++i) logits[j] += xs[t * d + i] * ws[j * d + i];
      }
      const size_t best = static_cast<size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
      double sum = 0;
      for (const double l : logits) sum += std::exp(l - logits[best]);
      lse[t] = logits[best] + std::log(sum), argmax[t] = static_cast<double>(best);
      log_prob[t] = logits[static_cast<size_t>(label)] - lse[t];
      loss -= scale * log_prob[t];
      for (size_t j = 0; j < v; ++j) {
        const double g = scale * (std::exp(logits[j] - lse[t]) - (static_cast<size_t>(label) == j ? 1 : 0));
        for (size_t i = 0; i < d; ++i) dx[t * d + i] += g * ws[j * d + i], dw[j * d + i] += g * xs[t * d + i];
      }
    }
  }
};

void check_case(const cases::CrossEntropyCase& c, DType dtype, DType w_dtype) {
  SCOPED_TRACE(::testing::Message() << name_of(dtype) << name_of(w_dtype) << " " << c.rows << "x" << c.width << "x"
                                    << c.vocabulary << " chunk " << c.chunk_rows);
  const DType gradient = dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  const Tensor x = random_tensor({c.rows, c.width}, dtype, 1),
               w = random_tensor({c.vocabulary, c.width}, w_dtype, 2, 0.5);
  const Tensor labels = some_labels(c.rows, c.vocabulary);
  const double scale = 0.25;
  const Oracle oracle(x, w, labels, scale);
  const Guarded dx({c.rows, c.width}, dtype), loss({1}, DType::kF64);
  const Tensor dw = Tensor::zeros({c.vocabulary, c.width}, gradient);
  run(LmHeadCrossEntropy{.x = x,
                         .w = w,
                         .labels = labels,
                         .scale = scale,
                         .chunk_rows = c.chunk_rows,
                         .loss = loss.tensor(),
                         .dx = dx.tensor(),
                         .dw = dw});
  // A logit of about sqrt(D)/2 carries the error of its sum; exp turns it into a relative error of the probability, and
  // exp itself adds about an ulp. The gradients sum up to V or T such terms of size at most scale.
  const double size = std::sqrt(static_cast<double>(c.width)) + 1;
  const double tolerance = size * (testing::sum_tolerance(gradient, c.width) + 4 * testing::unit_roundoff(gradient));
  const double rows = static_cast<double>(c.rows);
  EXPECT_TRUE(testing::close(loss.tensor(), {oracle.loss}, tolerance, scale * rows * tolerance));
  EXPECT_TRUE(testing::close(dx.tensor(), oracle.dx, testing::sum_tolerance(dtype, c.vocabulary) + tolerance,
                             scale * tolerance));
  EXPECT_TRUE(testing::close(dw, oracle.dw, testing::sum_tolerance(gradient, c.rows) + tolerance, scale * tolerance));

  const Guarded log_prob({c.rows}, DType::kF64), lse({c.rows}, DType::kF64), argmax({c.rows}, DType::kI32);
  run(LabelScores{.x = x,
                  .w = w,
                  .labels = labels,
                  .chunk_rows = c.chunk_rows,
                  .log_prob = log_prob.tensor(),
                  .lse = lse.tensor(),
                  .argmax = argmax.tensor()});
  EXPECT_TRUE(testing::close(log_prob.tensor(), oracle.log_prob, tolerance, tolerance));
  EXPECT_TRUE(testing::close(lse.tensor(), oracle.lse, tolerance, tolerance));
  EXPECT_TRUE(testing::close(argmax.tensor(), oracle.argmax, 0));
}

void check_cases() {
  size_t turn = 0;
  for (const auto& c : cases::cross_entropy) {
    if (testing::is_run_now(turn, 3)) check_case(c, DType::kF32, DType::kF32);
    if (testing::is_run_now(turn + 1, 3)) check_case(c, DType::kF32, DType::kBF16);
    if (testing::is_run_now(turn + 2, 3)) check_case(c, DType::kBF16, DType::kBF16);
    if (default_device() == DeviceKind::kCpu) check_case(c, DType::kF64, DType::kF64);
    ++turn;
  }
}

TEST(CrossEntropy, MatchesTheEquation) { testing::on_each_device<LmHeadCrossEntropy, LabelScores>(check_cases); }

TEST(CrossEntropy, GradientCheck) {
  const Tensor x = random_tensor({6, 5}, DType::kF64, 4), w = random_tensor({11, 5}, DType::kF64, 5);
  const Tensor labels = some_labels(6, 11), loss = Tensor::empty({1}, DType::kF64);
  const Tensor dx = Tensor::empty({6, 5}, DType::kF64), dw = Tensor::zeros({11, 5}, DType::kF64);
  run(LmHeadCrossEntropy{
      .x = x, .w = w, .labels = labels, .scale = 0.2, .chunk_rows = 4, .loss = loss, .dx = dx, .dw = dw});
  const auto value = [&] {
    run(LmHeadCrossEntropy{.x = x, .w = w, .labels = labels, .scale = 0.2, .loss = loss});
    return loss.data<double>()[0];
  };
  EXPECT_TRUE(testing::gradient_matches(value, x, dx));
  EXPECT_TRUE(testing::gradient_matches(value, w, dw));
}

void check_large_logits() {
  // Logits of +-30,000: e^logit is far out of range, the loss is not.
  const Tensor x = Tensor::from<float>({300, -300}, {2, 1}), w = Tensor::from<float>({100, -100, 99.5f}, {3, 1});
  const Tensor labels = Tensor::from<int32_t>({0, 0}, {2}), loss = Tensor::empty({1}, DType::kF64);
  const Tensor dx = Tensor::empty({2, 1}, DType::kF32), dw = Tensor::zeros({3, 1}, DType::kF32);
  run(LmHeadCrossEntropy{.x = x, .w = w, .labels = labels, .loss = loss, .dx = dx, .dw = dw});
  EXPECT_DOUBLE_EQ(to_doubles(loss)[0], 60000);
  EXPECT_TRUE(testing::close(dx, {0, -200}, 1e-6));
  EXPECT_TRUE(testing::close(dw, {300, -300, 0}, 1e-6));
}

TEST(CrossEntropy, LargeLogitsStayFinite) { testing::on_each_device<LmHeadCrossEntropy>(check_large_logits); }

void check_ties() {
  const Tensor x = Tensor::from<float>({1, 0}, {1, 2}), w = Tensor::from<float>({1, 9, 3, 1, 3, 2, 3, 0}, {4, 2});
  const Tensor labels = Tensor::from<int32_t>({3}, {1}), argmax = Tensor::empty({1}, DType::kI32);
  run(LabelScores{.x = x, .w = w, .labels = labels, .argmax = argmax});
  EXPECT_EQ(to_doubles(argmax)[0], 1);
}

TEST(CrossEntropy, LowestTokenWinsTies) { testing::on_each_device<LabelScores>(check_ties); }

void check_accumulation() {
  const Tensor x = random_tensor({5, 8}, DType::kF32, 6), w = random_tensor({19, 8}, DType::kF32, 7);
  const Tensor labels = some_labels(5, 19), loss = Tensor::empty({1}, DType::kF64);
  const Tensor once = Tensor::zeros({19, 8}, DType::kF32), twice = Tensor::zeros({19, 8}, DType::kF32);
  const Guarded dx({5, 8}, DType::kF32);
  run(LmHeadCrossEntropy{.x = x, .w = w, .labels = labels, .loss = loss, .dx = dx.tensor(), .dw = once});
  for (int i = 0; i < 2; ++i) run(LmHeadCrossEntropy{.x = x, .w = w, .labels = labels, .loss = loss, .dw = twice});
  std::vector<double> doubled = to_doubles(once);
  for (double& v : doubled) v *= 2;
  EXPECT_TRUE(testing::close(twice, doubled, 1e-6));
  for (const double g : to_doubles(dx.tensor().slice(3, 5))) EXPECT_EQ(g, 0);
  const Tensor none = Tensor::from<int32_t>({kIgnored, kIgnored, kIgnored, kIgnored, kIgnored}, {5});
  run(LmHeadCrossEntropy{.x = x, .w = w, .labels = none, .loss = loss, .dx = dx.tensor(), .dw = twice});
  EXPECT_EQ(to_doubles(loss)[0], 0);
  EXPECT_TRUE(testing::close(dx.tensor(), std::vector<double>(40, 0), 0));
  EXPECT_TRUE(testing::close(twice, doubled, 1e-6));
}

TEST(CrossEntropy, AccumulatesTheWeightGradientAndZeroesIgnoredRows) {
  testing::on_each_device<LmHeadCrossEntropy>(check_accumulation);
}

TEST(CrossEntropy, RefusesLabelsOutsideTheVocabulary) {
  const Tensor x = Tensor::zeros({1, 2}, DType::kF32), w = Tensor::zeros({3, 2}, DType::kF32);
  const Tensor loss = Tensor::empty({1}, DType::kF64);
  for (const int32_t label : {3, -1}) {
    EXPECT_THROW(run(LmHeadCrossEntropy{.x = x, .w = w, .labels = Tensor::from<int32_t>({label}, {1}), .loss = loss}),
                 Error);
  }
}

}  // namespace
}  // namespace lightmoe
