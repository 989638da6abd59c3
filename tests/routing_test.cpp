// Choices at run time: fewer experts per token, skipping; counted, and equal to what they must be equal to.

#include "model/routing.h"

#include <gtest/gtest.h>

#include "compress/skipping.h"
#include "compress/weights.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;

// Two tokens, four slots, top 3. Token 0: gates .5 .2 .1; token 1: .4 .3 .25.
RoutedTokens two_tokens() {
  return {Tensor::from(std::vector<int32_t>{0, 1, 2, 3, 1, 0}, {2, 3}),
          Tensor::from(std::vector<double>{.5, .2, .1, .4, .3, .25}, {2, 3})};
}
std::vector<int32_t> slots_of(const RoutedTokens& r) {
  return {r.slots.data<int32_t>(), r.slots.data<int32_t>() + r.slots.numel()};
}

TEST(Routing, SkipsBelowTheThresholdByHand) {
  RoutingCounts counts;
  // .3 of the first gate: .15 for token 0 (skips .1), .12 for token 1 (skips nothing).
  RoutingOptions options{.skip_threshold = {9, .3}, .counts = &counts};
  const RoutedTokens before = two_tokens();
  const RoutedTokens after = apply_skipping(options, 1, 4, false, before);
  EXPECT_EQ(slots_of(after), (std::vector<int32_t>{0, 1, 4, 3, 1, 0}));
  EXPECT_TRUE(testing::close(after.gates, {.5, .2, 0, .4, .3, .25}, 0));
  EXPECT_EQ(slots_of(before), (std::vector<int32_t>{0, 1, 2, 3, 1, 0}));  // what the router gave is left as it was
  EXPECT_EQ(counts.chosen, 6);
  EXPECT_EQ(counts.skipped, 1);
  const RoutedTokens renormalised = apply_skipping(options, 1, 4, true, before);
  EXPECT_TRUE(testing::close(renormalised.gates, {.5 / .7, .2 / .7, 0, .4 / .95, .3 / .95, .25 / .95}, 1e-15));
  // Slots 3 and 1 are three times as alike as the mean: token 1's second choice needs .9 * .4 = .36 now.
  options.skip_factor.assign(2, std::vector<double>(16, 1.0));
  options.skip_factor[1][3 * 4 + 1] = 3;
  EXPECT_EQ(slots_of(apply_skipping(options, 1, 4, false, before)), (std::vector<int32_t>{0, 1, 4, 3, 4, 0}));
}

Tensor logits_with(const Olmoe& model, const RoutingOptions* routing) {
  const Document& document = CompressionGround::golden().held_out.front();
  const Batch batch = make_batch(document.ids, 1, static_cast<int64_t>(document.ids.size()));
  return model.logits(model.forward(batch, {.routing = routing}), {});
}

TEST(Routing, LimitsAreWhatTheyMustBe) {
  const auto model = load_model(CompressionGround::golden().model, DType::kF32);
  const Tensor whole = logits_with(*model, nullptr);
  RoutingCounts counts;
  const RoutingOptions nothing{.skip_threshold = {0, 0}, .counts = &counts};
  EXPECT_TRUE(testing::bits_equal(logits_with(*model, &nothing), whole));
  EXPECT_EQ(counts.skipped, 0);
  // Every choice but the first skipped is a router of one expert (gates are not renormalised).
  const RoutingOptions all{.skip_threshold = {2, 2}, .counts = &counts}, one{.top_k = 1};
  counts = {};
  const Tensor first_alone = logits_with(*model, &all);
  EXPECT_TRUE(testing::close(first_alone, testing::to_doubles(logits_with(*model, &one)), 1e-6));
  EXPECT_EQ(counts.skipped, counts.chosen / 8 * 7);
  EXPECT_FALSE(testing::close(first_alone, testing::to_doubles(whole), 1e-3));
  const RoutingOptions too_many{.top_k = 9};
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"9 experts per token", "1 to 8"},
                                  [&] { logits_with(*model, &too_many); }));
}

// Slots that share an expert, so that choices are merged before dispatch, beside masked and skipped ones.
TEST(Routing, SkippingWorksOnCompressedModels) {
  const testing::TempDir where;
  for (const char* method : {"conmoe", "reap", "mone", "molae", "lightmoe", "fisher-l"}) {
    CompressionGround::golden().compress(method, .4, where / method);
    const auto model = load_model(where / method, DType::kF32);
    const RoutingOptions all{.skip_threshold = {2, 2}}, one{.top_k = 1};
    EXPECT_TRUE(testing::close(logits_with(*model, &all), testing::to_doubles(logits_with(*model, &one)), 1e-6))
        << method;
  }
}

// Half of the lower choices of the sample are below the median ratio; nothing is below the smallest.
TEST(Routing, ThresholdsAreQuantilesOfTheSample) {
  const CompressionGround& ground = CompressionGround::golden();
  const auto model = load_model(ground.model, DType::kF32);
  for (const double quantile : {0.0, .5, .9}) {
    RoutingCounts counts;
    const RoutingOptions options{.skip_threshold = skip_thresholds(ground.statistics, *model, quantile),
                                 .counts = &counts};
    for (const Document& document : ground.calibration) {
      const Batch batch = make_batch(document.ids, 1, static_cast<int64_t>(document.ids.size()));
      model->forward(batch, {.routing = &options});
    }
    // Seven of eight choices may go. The sample is the text itself, up to where documents are cut; skipping moves later layers' gates.
    const double share = static_cast<double>(counts.skipped) / static_cast<double>(counts.chosen);
    EXPECT_NEAR(share, quantile * 7 / 8, .03) << quantile;
  }
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"skip quantile 2"},
                                  [&] { skip_thresholds(ground.statistics, *model, 2); }));
  Statistics bare = ground.statistics;
  bare.sample_sequence.clear();
  EXPECT_TRUE(testing::fails_with(ErrorKind::kInput, {"no token sample"}, [&] { skip_thresholds(bare, *model, .5); }));
}

// Two slots of one function are as alike as can be; the mean over pairs is 1.
TEST(Routing, LikenessFactors) {
  const CompressionGround& ground = CompressionGround::golden();
  const auto model = load_model(ground.model, DType::kF32);
  model->blocks[1].moe.experts[5] = model->blocks[1].moe.experts[9];
  const std::vector<std::vector<double>> factors = skip_factors(ground.statistics, *model);
  ASSERT_EQ(factors.size(), 2u);
  for (const std::vector<double>& layer : factors) {
    double sum = 0;
    for (size_t i = 0; i < 64; ++i) {
      for (size_t j = 0; j < i; ++j) {
        EXPECT_EQ(layer[i * 64 + j], layer[j * 64 + i]);
        sum += layer[i * 64 + j];
      }
    }
    EXPECT_NEAR(sum / (64 * 63 / 2), 1, 1e-12);
  }
  EXPECT_EQ(*std::max_element(factors[1].begin(), factors[1].end()), factors[1][5 * 64 + 9]);
  Statistics bare = ground.statistics;
  for (LayerStatistics& layer : bare.layers) layer.sample_inputs.clear();
  EXPECT_TRUE(testing::fails_with(ErrorKind::kInput, {"--sample-inputs"}, [&] { skip_factors(bare, *model); }));
}

// What skipping saves and costs on the trained demo model: printed; at the median about half of the lower choices go.
TEST(Routing, SkippingOnTheDemo) {
  const CompressionGround& ground = CompressionGround::demo();
  const auto model = load_model(ground.model, DType::kF32);
  const double original = ground.loss(*model);
  for (const bool by_likeness : {false, true}) {
    RoutingCounts counts;
    RoutingOptions options{.skip_threshold = skip_thresholds(ground.statistics, *model, .5), .counts = &counts};
    if (by_likeness) options.skip_factor = skip_factors(ground.statistics, *model);
    const double loss = ground.loss(*model, &options);
    fmt::print("             {}: {} of {} choices skipped, loss {:.3f} (original {:.3f})\n",
               by_likeness ? "DiEP" : "NAEE", counts.skipped, counts.chosen, loss, original);
    EXPECT_GT(counts.skipped, counts.chosen / 5);
    EXPECT_LT(counts.skipped, counts.chosen / 2);
    EXPECT_LT(loss, original + 2);
  }
}

}  // namespace
}  // namespace lightmoe
