// ConMoE: prototypes and the map by hand, one stored expert for several slots and layers.

#include <gtest/gtest.h>

#include "compress/exporter.h"
#include "model/summary.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"
#include "tests/support/tiny_experts.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;
using testing::TempDir;
using testing::TinyModel;

// Every matrix of expert e is v_e everywhere: d(e, e') = 2 |v - v'| / (|v| + |v'|).
// v = 1, 3, 1.5, -1:  d01 = 1, d02 = .4, d03 = 2, d12 = 2/3, d13 = 2, d23 = 2;  b = .4, 2/3, .4, 2;  scaled (b - .4) / 1.6 = 0, 1/6, 0, 1.
// a = 4, 3, 2, 1 scaled to 1, 2/3, 1/3, 0;  a b = 0, 1/9, 0, 0: prototypes 1, then the lowest of the equal ones, 0.
TEST(ConMoe, ByHand) {
  const auto weights = [](int64_t, int64_t expert, ExpertMatrix, int64_t, int64_t) {
    constexpr float kValues[] = {1, 3, 1.5f, -1};
    return kValues[expert];
  };
  TinyModel tiny(1, weights);
  LayerStatistics& layer = tiny.statistics.layers[0];
  layer.count = {1, 1, 1, 1};
  layer.gate_output_norm = {4, 3, 2, 1};
  const Plan plan = tiny.plan("conmoe");
  ASSERT_EQ(plan.layers[0].bank.size(), 2u);
  EXPECT_EQ(plan.layers[0].bank[0].experts, (std::vector<int32_t>{0}));
  EXPECT_EQ(plan.layers[0].bank[1].experts, (std::vector<int32_t>{1}));
  // 2 goes to 0 (.4 < 2/3); 3 is as far from both, up to rounding.
  const std::vector<int32_t> expected = {0, 1, 0};
  for (size_t s = 0; s < 3; ++s) EXPECT_EQ(plan.layers[0].shape.slots[s].expert, expected[s]) << s;
  EXPECT_EQ(plan.layers[0].replaced, (std::vector<int32_t>{2, 3}));
}

// Two layers with values on a line. Prototypes are 1 of layer 0, 20 and -30 of layer 1 and one of -2, -4; layer 0's 5 and 9 are nearest
// to layer 1's 20, which layer 0 therefore stores.
TEST(ConMoe, AScopeOfTwoLayersStoresOnce) {
  const auto weights = [](int64_t l, int64_t expert, ExpertMatrix, int64_t, int64_t) {
    constexpr float kValues[2][4] = {{1, -2, 5, 9}, {-4, 5, 20, -30}};
    return kValues[l][expert];
  };
  TinyModel tiny(2, weights);
  for (LayerStatistics& layer : tiny.statistics.layers) layer.count = {1, 1, 1, 1};
  tiny.statistics.layers[0].gate_output_norm = {9, 9, 9, 1};
  tiny.statistics.layers[1].gate_output_norm = {9, 1, 9, 9};
  tiny.options.budget = {BudgetKind::kExperts, .5};
  const Plan plan = tiny.plan("conmoe-2");
  int64_t stored = 0, borrowed = 0;
  for (const LayerPlan& layer : plan.layers) {
    for (size_t j = 0; j < layer.bank.size(); ++j) (layer.shape.stores(j) ? stored : borrowed) += 1;
  }
  EXPECT_EQ(stored, 4);
  EXPECT_GT(borrowed, 0);
  const ModelSize size = model_size(tiny.config);
  EXPECT_EQ(stored_parameters(plan.shapes(), size), size.total() - 4 * size.expert);
  EXPECT_TRUE(
      testing::fails_with(ErrorKind::kUsage, {"scope of 4 layers", "the model has 2"}, [&] { tiny.plan("conmoe-4"); }));
}

TEST(ConMoe, IdentityAtRatioZero) {
  testing::expect_identity_at_zero("conmoe");
  testing::expect_identity_at_zero("conmoe-2");
}
TEST(ConMoe, BytesReallyFall) {
  testing::expect_bytes_saved("conmoe", .5);
  testing::expect_bytes_saved("conmoe-2",
                              .5);  // live bytes are counted by the allocator: an expert of two layers is there once
}
TEST(ConMoe, ExportsTheSameFunction) {
  testing::expect_export_is_the_same("conmoe", .5);
  testing::expect_export_is_the_same("conmoe-2", .5);
}
TEST(ConMoe, DemoLoss) {
  for (const char* method : {"conmoe", "conmoe-2", "conmoe-4"}) testing::expect_useful_on_demo(method);
}

// Prototypes of two layers are one parameter; a training step reaches them from both, and what is saved has them once.
TEST(ConMoe, RecoversAcrossLayers) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  ground.compress("conmoe-2", .5, where / "out");
  const ModelSummary summary = summarize_model(where / "out");
  EXPECT_GT(summary.layers[1].borrowed, 0);
  EXPECT_EQ(summary.layers[0].borrowed, 0);
  testing::expect_recovers("conmoe-2", .5, 1 << 20);  // adapters of experts of two layers stay
}

}  // namespace
}  // namespace lightmoe
