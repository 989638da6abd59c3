#include "model/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "runtime/error.h"

namespace lightmoe {
namespace {

// Draws n tokens and compares with the expected distribution: chi-square, and ids of probability 0 never appear.
// The bound is the 99.99 % point of chi-square for the degrees of freedom (Wilson and Hilferty's cube-root approximation); the
// seed is fixed, so the test either always passes or always fails.
void expect_distribution(const std::vector<float>& logits, const SamplingOptions& options,
                         const std::vector<double>& expected, int n = 40000) {
  std::vector<int> counts(logits.size(), 0);
  Philox rng(options.seed, 7);
  for (int i = 0; i < n; ++i) ++counts[static_cast<size_t>(sample(logits, options, rng))];
  double chi_square = 0, degrees = -1;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (expected[i] == 0) {
      EXPECT_EQ(counts[i], 0) << "id " << i;
      continue;
    }
    const double mean = expected[i] * n;
    chi_square += (counts[i] - mean) * (counts[i] - mean) / mean;
    degrees += 1;
  }
  if (degrees == 0) {
    EXPECT_EQ(chi_square, 0);
    return;
  }
  const double h = 2 / (9 * degrees), bound = degrees * std::pow(1 - h + 3.719 * std::sqrt(h), 3);
  EXPECT_LT(chi_square, bound) << degrees << " degrees of freedom";
}

std::vector<double> softmax(const std::vector<float>& logits, double temperature) {
  std::vector<double> p;
  for (float l : logits) p.push_back(std::exp(l / temperature));
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= sum;
  return p;
}

const std::vector<float> kLogits = {0.5f, 2.0f, -1.0f, 1.0f, 2.0f, 0.0f, -3.0f};

TEST(Sampling, GreedyTakesTheLowestOfTheLargest) {
  Philox rng(1);
  EXPECT_EQ(sample(kLogits, {}, rng), 1);
  EXPECT_EQ(rng.position(), Philox(1).position());  // no draw
  EXPECT_EQ(argmax(std::vector<float>{-INFINITY, -2.0f, -INFINITY}), 1);
}

TEST(Sampling, FollowsTheSoftmax) {
  for (double temperature : {0.3, 1.0, 4.0}) {
    expect_distribution(kLogits, {.temperature = temperature}, softmax(kLogits, temperature));
  }
}

TEST(Sampling, TopKKeepsTheLargestAndTheLowerIdOfATie) {
  expect_distribution(kLogits, {.temperature = 1, .top_k = 1}, {0, 1, 0, 0, 0, 0, 0}, 1000);
  const double e = std::exp(2.0), f = std::exp(1.0), sum = 2 * e + f;
  expect_distribution(kLogits, {.temperature = 1, .top_k = 3}, {0, e / sum, 0, f / sum, e / sum, 0, 0});
  expect_distribution(kLogits, {.temperature = 1, .top_k = 100}, softmax(kLogits, 1));
}

TEST(Sampling, TopPKeepsTheIdThatCrosses) {
  // Probabilities 0.5, 0.25, 0.125, 0.125: exact in binary, so the border cases are exact too.
  const std::vector<float> logits = {0, static_cast<float>(std::log(2.0)), static_cast<float>(std::log(4.0)), 0};
  const auto with = [](double p) { return SamplingOptions{.temperature = 1, .top_p = p}; };
  expect_distribution(logits, with(0.4), {0, 0, 1, 0}, 1000);
  expect_distribution(logits, with(0.6), {0, 1.0 / 3, 2.0 / 3, 0});
  expect_distribution(logits, with(0.8), {1.0 / 7, 2.0 / 7, 4.0 / 7, 0});  // the tie goes to the lower id
  expect_distribution(logits, with(1.0), {0.125, 0.25, 0.5, 0.125});
  // After top-k the rest is renormalised: 4/6 and 2/6, so 0.6 keeps only the first.
  expect_distribution(logits, {.temperature = 1, .top_k = 2, .top_p = 0.6}, {0, 0, 1, 0}, 1000);
}

TEST(Sampling, MaskedIdsNeverAppear) {
  std::vector<float> logits = kLogits;
  logits[1] = -INFINITY;
  std::vector<double> expected = softmax(logits, 1);
  EXPECT_EQ(expected[1], 0);
  expect_distribution(logits, {.temperature = 1}, expected);
}

TEST(Sampling, LargeLogitsDoNotOverflow) {
  expect_distribution({1000, 1000, -1000}, {.temperature = 0.01}, {0.5, 0.5, 0});
}

TEST(Sampling, RefusesBadNumbersAndOptions) {
  Philox rng(1);
  EXPECT_THROW(sample(std::vector<float>{0, NAN}, {}, rng), Error);
  EXPECT_THROW(sample(std::vector<float>{0, INFINITY}, {.temperature = 1}, rng), Error);
  EXPECT_THROW(sample(std::vector<float>{-INFINITY}, {}, rng), Error);
  EXPECT_THROW(argmax(std::vector<float>{}), Error);
  EXPECT_THROW(check_sampling({.temperature = -0.1}), Error);
  EXPECT_THROW(check_sampling({.temperature = NAN}), Error);
  EXPECT_THROW(check_sampling({.top_k = -1}), Error);
  EXPECT_THROW(check_sampling({.top_p = 0}), Error);
  EXPECT_THROW(check_sampling({.top_p = 1.5}), Error);
  EXPECT_NO_THROW(check_sampling({.temperature = 0.7, .top_k = 40, .top_p = 0.95}));
}

}  // namespace
}  // namespace lightmoe
