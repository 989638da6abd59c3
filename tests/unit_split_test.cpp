// MoEfication of the experts: blocks of one size, the same function, selectors that learn, and what fewer blocks cost on the demo model.

#include "compress/unit_split.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "compress/balanced_kmeans.h"
#include "compress/unit_selector.h"
#include "model/extend.h"
#include "model/routing.h"
#include "model/unit_blocks.h"
#include "runtime/philox.h"
#include "tests/support/compression.h"
#include "tests/support/program.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;
using testing::fails_with;
using testing::TempDir;

TEST(BalancedKMeans, ClustersOfOneSize) {
  // Four rows along x, one along y, one between: the fourth along x has to leave for the other cluster, as the nearest to y of them does.
  const std::vector<double> rows = {1, 0, 1, .01, 1, .02, 1, .3, 0, 1, .5, 1};
  EXPECT_EQ(balanced_kmeans(rows, 6, 2, 1), (Clusters{{0, 1, 2}, {3, 4, 5}}));
  EXPECT_EQ(balanced_kmeans(rows, 6, 1, 1), (Clusters{{0, 1, 2, 3, 4, 5}}));
  EXPECT_EQ(balanced_kmeans(rows, 6, 6, 1).size(), 6u);
  EXPECT_THROW(balanced_kmeans(rows, 6, 4, 1), Error);
  // Twins, shuffled and scaled, come together.
  Philox random(3);
  std::vector<double> twins(12 * 5);
  for (size_t pair = 0; pair < 6; ++pair) {
    for (size_t j = 0; j < 5; ++j) {
      const double v = random.normal();
      twins[pair * 5 + j] = v;
      twins[(11 - pair) * 5 + j] = 3 * v;
    }
  }
  for (const auto& cluster : balanced_kmeans(twins, 12, 6, 2)) EXPECT_EQ(cluster[0] + cluster[1], 11);
}

// Block b contributes where feature b is the largest of x: a linear map decides.
TEST(UnitSelector, LearnsWhatALinearMapDecides) {
  const int64_t rows = 600, blocks = 4;
  const Tensor x = testing::random_tensor({rows, 6}, DType::kF32, 5), c = Tensor::empty({rows, blocks}, DType::kF32);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t b = 0; b < blocks; ++b) c.data<float>()[t * blocks + b] = std::exp(2 * x.data<float>()[t * 6 + b]);
  }
  const UnitSelector selector = train_selector(x.slice(0, 500), c.slice(0, 500), {}, 1);
  const Tensor picked = keep_largest(select_scores(selector, x.slice(500, rows)), 1),
               right = keep_largest(c.slice(500, rows), 1);
  int64_t hits = 0;
  for (int64_t i = 0; i < picked.numel(); ++i) hits += picked.data<float>()[i] * right.data<float>()[i] > 0 ? 1 : 0;
  EXPECT_GT(hits, 85);  // of 100, by chance 25
}

std::multiset<std::vector<float>> units_of(const Expert& e) {
  std::multiset<std::vector<float>> units;
  const int64_t f = e.down->value.dim(1), d = e.down->value.dim(0);
  for (int64_t j = 0; j < f; ++j) {
    std::vector<float> unit;
    for (const int64_t row : {j, f + j})
      unit.insert(unit.end(), e.gate_up->value.data<float>() + row * d, e.gate_up->value.data<float>() + (row + 1) * d);
    for (int64_t i = 0; i < d; ++i) unit.push_back(e.down->value.data<float>()[i * f + j]);
    units.insert(unit);
  }
  return units;
}

Tensor states(const Olmoe& model, const CompressionGround& ground, const RoutingOptions* routing = nullptr) {
  const Document& document = ground.held_out.front();
  return model.forward(make_batch(document.ids, 1, static_cast<int64_t>(document.ids.size())), {.routing = routing});
}

TEST(UnitSplit, IsTheSameFunctionOfTheSameUnits) {
  const CompressionGround& ground = CompressionGround::golden();
  const auto original = load_model(ground.model, DType::kF32);
  const std::vector<double> expected = testing::to_doubles(states(*original, ground));
  for (const UnitLikeness likeness : {UnitLikeness::kWeights, UnitLikeness::kActivations}) {
    const auto model = load_model(ground.model, DType::kF32);
    const UnitSplitReport report = split_units(
        *model, &ground.statistics,
        {.blocks = 4, .likeness = likeness, .selectors = likeness == UnitLikeness::kActivations, .epochs = 2});
    // Sums of 16 units in another order, in f32.
    EXPECT_TRUE(testing::close(states(*model, ground), expected, 1e-5));
    const Expert &before = original->blocks[1].moe.experts[7], &after = model->blocks[1].moe.experts[7];
    EXPECT_EQ(units_of(before), units_of(after));
    EXPECT_FALSE(testing::bits_equal(before.down->value, after.down->value));  // something moved
    if (likeness == UnitLikeness::kWeights) {
      EXPECT_TRUE(report.layers.empty());
      EXPECT_EQ(model->blocks[0].moe.extension, nullptr);
      continue;
    }
    for (const bool oracle : {false, true}) {
      const RoutingOptions all{.unit_blocks = 4, .unit_oracle = oracle}, half{.unit_blocks = 2, .unit_oracle = oracle};
      EXPECT_TRUE(testing::close(states(*model, ground, &all), expected, 1e-5));
      EXPECT_FALSE(testing::close(states(*model, ground, &half), expected, 1e-3));
    }
    for (const UnitSplitReport::Layer& layer : report.layers) {
      EXPECT_GT(layer.choices, 100);
      EXPECT_GT(layer.oracle, layer.selector);
      EXPECT_LE(layer.oracle, 1);
    }
  }
}

// An expert whose units are pairs, far apart: weights put the pairs together.
TEST(UnitSplit, LikeUnitsComeTogether) {
  const CompressionGround& ground = CompressionGround::golden();
  const auto model = load_model(ground.model, DType::kF32);
  const Expert& e = model->blocks[0].moe.experts[3];
  const int64_t f = e.down->value.dim(1);
  for (int64_t j = 0; j < f / 2; ++j) {
    for (const int64_t half : {int64_t{0}, f})
      e.gate_up->value.row(half + f - 1 - j).copy_from(e.gate_up->value.row(half + j));
  }
  split_units(*model, nullptr, {.blocks = f / 2, .likeness = UnitLikeness::kWeights, .selectors = false});
  for (int64_t b = 0; b < f / 2; ++b)
    EXPECT_TRUE(testing::bits_equal(e.gate_up->value.row(2 * b), e.gate_up->value.row(2 * b + 1))) << b;
}

// The same with up negated in one of each pair: their weights are no longer alike, they still fire together.
TEST(UnitSplit, UnitsThatFireTogetherComeTogether) {
  const CompressionGround& ground = CompressionGround::golden();
  const auto model = load_model(ground.model, DType::kF32);
  const Expert& e = model->blocks[0].moe.experts[3];
  const int64_t f = e.down->value.dim(1), d = e.down->value.dim(0);
  for (int64_t j = 0; j < f / 2; ++j) {
    e.gate_up->value.row(f - 1 - j).copy_from(e.gate_up->value.row(j));
    for (int64_t i = 0; i < d; ++i)
      e.gate_up->value.row(f + f - 1 - j).data<float>()[i] = -e.gate_up->value.row(f + j).data<float>()[i];
  }
  split_units(*model, &ground.statistics, {.blocks = f / 2, .selectors = false});
  for (int64_t b = 0; b < f / 2; ++b)
    EXPECT_TRUE(testing::bits_equal(e.gate_up->value.row(2 * b), e.gate_up->value.row(2 * b + 1))) << b;
}

TEST(UnitSplit, BadInputIsOneLine) {
  const CompressionGround& ground = CompressionGround::golden();
  const auto model = load_model(ground.model, DType::kF32);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--blocks 3", "intermediate_size 16"},
                         [&] { split_units(*model, &ground.statistics, {.blocks = 3}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"--sample-inputs"}, [&] { split_units(*model, nullptr, {.blocks = 4}); }));
  Statistics bare = ground.statistics;
  for (LayerStatistics& layer : bare.layers) layer.sample_inputs.clear();
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"--sample-inputs"}, [&] { split_units(*model, &bare, {.blocks = 4}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--by size"}, [] { parse_unit_likeness("size"); }));
  const TempDir where;
  ground.compress("lightmoe", .4, where / "out");
  const auto adapted = load_model(where / "out", DType::kF32);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"an expert of its own"},
                         [&] { split_units(*adapted, &ground.statistics, {.blocks = 4}); }));
}

TEST(UnitSplit, FromTheProgram) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const std::string tokens = ground.model / "golden.safetensors";
  save_statistics(ground.statistics, where / "s.safetensors");
  testing::ProgramResult run =
      testing::run_lightmoe({"split-units", ground.model, "--statistics", where / "s.safetensors", "--blocks", "4",
                             "--epochs", "2", "-o", where / "out"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_NE(run.out.find("4 blocks of 4 units in every expert, with selectors"), std::string::npos) << run.out;
  run = testing::run_lightmoe({"eval", where / "out", "--tokens", tokens, "--unit-blocks", "3"});
  EXPECT_NE(run.out.find("ran (75.0 %)"), std::string::npos) << run.out << run.err;
  run = testing::run_lightmoe({"eval", ground.model, "--tokens", tokens, "--unit-blocks", "3"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_NE(run.err.find("split-units makes such a model"), std::string::npos) << run.err;
  run = testing::run_lightmoe(
      {"split-units", ground.model, "--by", "weights", "--no-selector", "--blocks", "4", "-o", where / "plain"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(read_config(where / "plain").lightmoe_json, "");  // a stock model still
}

// Quality against the share of blocks that run, on the trained model: printed.
TEST(UnitSplit, OnTheDemo) {
  const CompressionGround& ground = CompressionGround::demo();
  const auto model = load_model(ground.model, DType::kF32);
  const double original = ground.loss(*model);
  const UnitSplitReport report = split_units(*model, &ground.statistics, {.blocks = 8});
  EXPECT_NEAR(ground.loss(*model), original, 1e-4);
  for (const UnitSplitReport::Layer& layer : report.layers) {
    fmt::print("             half of the blocks hold {:.3f} of the contributions, the selector's half {:.3f}\n",
               layer.oracle, layer.selector);
    EXPECT_GT(layer.selector, .55);  // any half: .5
  }
  for (const int64_t blocks : {6, 4, 2}) {
    double loss[2];
    for (const bool oracle : {false, true}) {
      const RoutingOptions routing{.unit_blocks = blocks, .unit_oracle = oracle};
      loss[oracle] = ground.loss(*model, &routing);
    }
    fmt::print("             {} of 8 blocks: loss {:.3f} by the selectors, {:.3f} by contribution (original {:.3f})\n",
               blocks, loss[0], loss[1], original);
    EXPECT_LT(loss[1], loss[0] + .05);
  }
}

}  // namespace
}  // namespace lightmoe
