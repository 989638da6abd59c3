// Prefetch hints (hit rates, unchanged output) and the CP and tensor-ring fits of stacked experts.

#include "compress/prefetch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "compress/tensor_fit.h"
#include "runtime/philox.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::bits_equal;
using testing::fails_with;

std::vector<std::vector<int32_t>> rows(int64_t count, uint64_t seed, int64_t vocab) {
  std::vector<std::vector<int32_t>> all;
  Philox random(seed, 0);
  for (int64_t i = 0; i < count; ++i) {
    auto& row = all.emplace_back();
    for (int j = 0; j < 20; ++j) row.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
  }
  return all;
}

TEST(Prefetch, LargestByHand) {
  const double scores[] = {.1, .7, .7, -1, .9};
  EXPECT_EQ(largest(scores, 5, 3), (std::vector<int32_t>{4, 1, 2}));
}

TEST(Prefetch, HitRatesHaveTheRightEnds) {
  const auto model = load_model("tests/golden/e64k8", DType::kF32);
  const auto train = rows(40, 1, 131), test = rows(10, 2, 131);
  const PrefetchReport r = measure_prefetch(*model, train, test, {.predicted = {8, 16, 64}});
  ASSERT_EQ(r.layers.size(), 1u);
  EXPECT_EQ(r.train_tokens, 800);
  EXPECT_EQ(r.test_tokens, 200);
  for (const auto& hits : {r.layers[0].router_hits, r.layers[0].linear_hits}) {
    EXPECT_LE(hits[0], hits[1]);
    EXPECT_EQ(hits[2], 1);         // everything predicted
    EXPECT_GT(hits[0], 8.0 / 64);  // better than eight experts drawn at random
  }
}

TEST(Prefetch, ALayerThatSeesTheSameIsPredictedPerfectly) {
  // Layer 0 adds nothing (down and output projections zero) and both layers have the same norms and router.
  const auto model = load_model("tests/golden/e64k8", DType::kF32);
  Block &first = model->blocks[0], &second = model->blocks[1];
  for (const Block* b : {&first, &second}) b->attention.o->value.fill_zero();
  for (const Expert& e : first.moe.experts) e.down->value.fill_zero();
  second.moe.router->value.copy_from(first.moe.router->value);
  second.post_attention_norm->value.copy_from(first.post_attention_norm->value);
  const PrefetchReport r = measure_prefetch(*model, rows(40, 1, 131), rows(10, 2, 131), {.predicted = {8}});
  EXPECT_EQ(r.layers[0].router_hits[0], 1);
  EXPECT_GT(r.layers[0].linear_hits[0], .99);
}

TEST(Prefetch, HintsDoNotChangeTheOutput) {
  const auto model = load_model("tests/golden/e64k8", DType::kF32);
  const Batch batch = make_batch(rows(1, 3, 131)[0], 1, 20);
  std::set<int32_t> hinted;
  int64_t calls = 0;
  const Observer hints = prefetch_hints(*model, 1, 8, [&](int64_t layer, const std::vector<int32_t>& experts) {
    EXPECT_EQ(layer, 1);
    EXPECT_EQ(experts.size(), 8u);
    hinted.insert(experts.begin(), experts.end());
    ++calls;
  });
  EXPECT_TRUE(bits_equal(model->forward(batch, {}), model->forward(batch, {.observer = &hints})));
  EXPECT_EQ(calls, 20);
  EXPECT_GT(hinted.size(), 8u);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--ahead 2"}, [&] { prefetch_hints(*model, 2, 8, {}); }));
}

Tensor normal(const Shape& shape, uint64_t seed) { return testing::random_tensor(shape, DType::kF64, seed); }

// sum_e a_e W_e x.
std::vector<double> mixture(const Tensor& w, const std::vector<double>& a, const std::vector<double>& x) {
  std::vector<double> y(static_cast<size_t>(w.dim(1)), 0.0);
  for (int64_t e = 0; e < w.dim(0); ++e) {
    for (int64_t p = 0; p < w.dim(1); ++p) {
      for (int64_t q = 0; q < w.dim(2); ++q)
        y[static_cast<size_t>(p)] +=
            a[static_cast<size_t>(e)] * x[static_cast<size_t>(q)] * w.data<double>()[(e * w.dim(1) + p) * w.dim(2) + q];
    }
  }
  return y;
}

TEST(TensorFit, FactorisedForwardIsTheMaterialisedOne) {
  const std::vector<double> a{.5, -1, 2}, x{1, 2, -1, .5, 3};
  const CpFit cp{.f = normal({3, 6}, 1), .o = normal({4, 6}, 2), .x = normal({5, 6}, 3)};
  const RingFit ring{.f = normal({3, 4}, 4), .o = normal({4, 4}, 5), .x = normal({5, 4}, 6)};
  const auto c = cp_forward(cp, a, x), cm = mixture(cp_tensor(cp), a, x);
  const auto r = ring_forward(ring, a, x), rm = mixture(ring_tensor(ring), a, x);
  for (size_t p = 0; p < 4; ++p) {
    EXPECT_NEAR(c[p], cm[p], 1e-12);
    EXPECT_NEAR(r[p], rm[p], 1e-12);
  }
}

TEST(TensorFit, FindsATensorOfThatForm) {
  const Tensor w = cp_tensor({.f = normal({6, 2}, 1), .o = normal({7, 2}, 2), .x = normal({8, 2}, 3)});
  EXPECT_LT(fit_cp(w, 2, 200, 1).relative_error, 1e-3);
  EXPECT_GT(fit_cp(w, 1, 200, 1).relative_error, .05);
  const Tensor ring = ring_tensor({.f = normal({6, 4}, 1), .o = normal({7, 4}, 2), .x = normal({8, 4}, 3)});
  EXPECT_LT(fit_ring(ring, 2, 400, 1).relative_error, 1e-2);
}

TEST(TensorFit, ErrorIsThatOfTheTensorAndFallsWithTheRank) {
  const Tensor w = normal({5, 6, 7}, 9);
  double last = 1;
  for (const int64_t rank : {2, 8, 30}) {
    const CpFit fit = fit_cp(w, rank, 60, 1);
    const Tensor back = cp_tensor(fit);
    double miss = 0, all = 0;
    for (int64_t i = 0; i < w.numel(); ++i) {
      miss += std::pow(w.data<double>()[i] - back.data<double>()[i], 2);
      all += std::pow(w.data<double>()[i], 2);
    }
    EXPECT_NEAR(fit.relative_error, std::sqrt(miss / all), 1e-9);
    EXPECT_LT(fit.relative_error, last);
    last = fit.relative_error;
  }
  EXPECT_LT(last, 0.1);  // rank 30 = 5 x 6 holds any tensor of 5 x 6 x 7
}

}  // namespace
}  // namespace lightmoe
