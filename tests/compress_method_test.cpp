// Methods as arithmetic: plans worked by hand, and the parameter counts of the paper.

#include <gtest/gtest.h>

#include "compress/adapter.h"
#include "compress/registry.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

OlmoeConfig olmoe_1b_7b() {
  OlmoeConfig c;
  c.vocab_size = 50304, c.hidden_size = 2048, c.intermediate_size = 1024, c.num_layers = 16;
  c.num_heads = c.num_kv_heads = 16, c.num_experts = 64, c.num_experts_per_token = 8;
  return c;
}

TEST(Methods, AreListedByName) {
  std::vector<std::string> names;
  for (const Method& method : methods()) names.push_back(method.name);
  for (const char* name : {"full", "lightmoe", "lightmoe-direct", "lora", "original", "replace-none", "replace-one"}) {
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
  }
  EXPECT_TRUE(std::is_sorted(names.begin(), names.end()));
  EXPECT_THROW(find_method("nope"), Error);
  EXPECT_EQ(find_method("lightmoe").anneal, .2);
  EXPECT_EQ(find_method("lightmoe-direct").anneal, 0);
}

// Published: 0.45 B trained by LightMoE and by every LoRA-based baseline.
TEST(Methods, TrainAsManyParametersAsThePaperSays) {
  const OlmoeConfig config = olmoe_1b_7b();
  const Statistics statistics = uniform_statistics(16, 64, 2048);
  const MethodOptions options;
  const MethodInput input{.config = config, .statistics = statistics, .options = options};
  const auto trained = [&](const char* name) {
    const Method& method = find_method(name);
    return trainable_parameters(method, input, method.plan(input));
  };
  EXPECT_EQ(trained("lightmoe"), 452984832);  // 301 989 888 in bases, 150 994 944 in adapters
  EXPECT_EQ(find_method("lora").rank(input), 48);
  EXPECT_EQ(trained("lora"), 452984832);
  EXPECT_NEAR(static_cast<double>(trained("replace-one")), 452984832., .01 * 452984832.);
  EXPECT_EQ(trained("replace-none"), 452984832);
  EXPECT_EQ(trained("full"), 6919161856);
  EXPECT_EQ(trained("original"), 0);
}

// One layer of five slots; G ascending 3 1 2 4 0 (.05 .10 .20 .25 .40); no sample: dealt out in turn.
TEST(Methods, LightMoePlanByHand) {
  OlmoeConfig config;
  config.vocab_size = 1, config.hidden_size = 10, config.intermediate_size = 10, config.num_layers = 1;
  config.num_heads = config.num_kv_heads = 1, config.num_experts = 5, config.num_experts_per_token = 1;
  Statistics statistics = uniform_statistics(1, 5, 10);
  statistics.layers[0].gate_mass = {40, 10, 20, 5, 25};
  MethodOptions options{.budget = {BudgetKind::kExpertsPerLayer, 3}, .bases = 2, .rank = 1};
  const MethodInput input{.config = config, .statistics = statistics, .options = options};
  const Plan plan = find_method("lightmoe").plan(input);
  ASSERT_EQ(plan.layers.size(), 1u);
  const LayerPlan& layer = plan.layers[0];
  EXPECT_EQ(layer.replaced, (std::vector<int32_t>{3, 1, 2, 4}));  // 5 - 3 stored + 2 bases
  ASSERT_EQ(layer.bank.size(), 3u);
  EXPECT_EQ(layer.bank[0].experts, (std::vector<int32_t>{0}));
  EXPECT_TRUE(layer.bank[0].is_copy());
  EXPECT_EQ(layer.bank[1].experts, (std::vector<int32_t>{4, 1}));  // dominant 4; 2 is the other; 1 then 3 dealt out
  EXPECT_EQ(layer.bank[2].experts, (std::vector<int32_t>{2, 3}));
  EXPECT_NEAR(layer.bank[1].weights[0], 25. / 35, 1e-15);
  EXPECT_NEAR(layer.bank[2].weights[1], 5. / 25, 1e-15);
  EXPECT_EQ(layer.bases, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(layer.adapter_slot, (std::vector<int32_t>{1, 2, 3, 4}));
  const std::vector<int32_t> experts = {0, 1, 2, 2, 1}, adapters = {-1, 0, 1, 2, 3};
  for (size_t s = 0; s < 5; ++s) {
    EXPECT_EQ(layer.shape.slots[s].expert, experts[s]);
    EXPECT_EQ(layer.shape.slots[s].adapter, adapters[s]);
  }

  options.method_rank = 1;
  const Plan none = find_method("replace-none").plan(input);
  EXPECT_EQ(none.layers[0].replaced.size(), 2u);  // no base among the three stored
  EXPECT_TRUE(none.layers[0].bank.back().is_zero());
  EXPECT_TRUE(none.layers[0].bases.empty());
  EXPECT_TRUE(find_method("lora").plan(input).is_plain());
}

TEST(Adapters, DrawsDependOnTheirPlaceAlone) {
  const AdapterSite site{.layer = 3, .slot = 7, .matrix = ExpertMatrix::kUp, .out = 6, .in = 50, .rank = 4};
  const AdapterFactors f = gaussian_factors(site, 0, 1), again = gaussian_factors(site, 0, 1);
  EXPECT_TRUE(testing::bits_equal(f.a, again.a));
  for (const double b : testing::to_doubles(f.b)) EXPECT_EQ(b, 0);
  AdapterSite other = site;
  other.slot = 8;
  EXPECT_FALSE(testing::bits_equal(f.a, gaussian_factors(other, 0, 1).a));
  EXPECT_FALSE(testing::bits_equal(f.a, gaussian_factors(site, 0, 2).a));
  other = site;
  other.zero_base = true;
  const AdapterFactors alone = gaussian_factors(other, .5, 1);
  EXPECT_NE(testing::to_doubles(alone.b)[0], 0);
  EXPECT_NEAR(testing::to_doubles(alone.a)[0], testing::to_doubles(f.a)[0] * .5 * std::sqrt(150.), 1e-6);
  other.matrix = ExpertMatrix::kDown;
  for (const double b : testing::to_doubles(gaussian_factors(other, 0, 1).b)) EXPECT_EQ(b, 0);
}

}  // namespace
}  // namespace lightmoe
