// Selection and grouping against numbers worked by hand, and the sizes of the paper (arXiv 2603.12645, table 1 and section 4.4).

#include "compress/selection.h"

#include <gtest/gtest.h>

#include <cmath>

namespace lightmoe {
namespace {

ModelSize size_of_model(int64_t layers, int64_t slots) {
  return {.layers = layers, .slots = slots, .expert = 1000, .adapter_unit = 10, .rest = 500};
}

// Gate masses per layer, logit norms per layer; every slot used.
Statistics make_statistics(const std::vector<std::vector<double>>& masses, const std::vector<double>& norms) {
  Statistics s =
      empty_statistics(static_cast<int64_t>(masses.size()), static_cast<int64_t>(masses[0].size()), 2, false);
  for (size_t l = 0; l < masses.size(); ++l) {
    s.layers[l].gate_mass = masses[l];
    s.layers[l].count.assign(masses[l].size(), 1);
    s.layers[l].logit_norm = norms[l];
  }
  return s;
}

using Slots = std::vector<int32_t>;

TEST(Selection, GateScoresAreNormalisedWithinALayer) {
  const Statistics s = make_statistics({{1, 3, 4, 8}, {0, 0, 0, 0}}, {1, 1});
  EXPECT_EQ(gate_scores(s.layers[0]), (std::vector<double>{1 / 16.0, 3 / 16.0, 4 / 16.0, 8 / 16.0}));
  EXPECT_EQ(gate_scores(s.layers[1]), (std::vector<double>{.25, .25, .25, .25}));
}

TEST(Selection, EarlyLayersGetTheLargerThreshold) {
  const SelectionOptions options;
  // Norms 100, 200, 600: factors 1/3, 2/3, 2.  p exp(-.3 (f - 1)): 1.2214 p -> 1.2 p;  1.10517 p;  .74082 p -> .8 p.
  const std::vector<double> factors = norm_factors(make_statistics({{1}, {1}, {1}}, {100, 200, 600}));
  EXPECT_NEAR(factors[0], 1 / 3.0, 1e-15);
  EXPECT_NEAR(factors[2], 2.0, 1e-15);
  EXPECT_DOUBLE_EQ(layer_threshold(.5, factors[0], options), .6);
  EXPECT_NEAR(layer_threshold(.5, factors[1], options), .5 * 1.1051709180756477, 1e-15);
  EXPECT_DOUBLE_EQ(layer_threshold(.5, factors[2], options), .4);
  EXPECT_EQ(layer_threshold(.5, 2, {.rule = SelectionRule::kAverage}), .5);
}

TEST(Selection, ThresholdTakesTheShortestPrefixThatExceedsIt) {
  // G ascending: slot 3 .05, 1 .10, 2 .20, 4 .25, 0 .40; cumulative .05 .15 .35 .60 1.
  const Statistics s = make_statistics({{40, 10, 20, 5, 25}}, {7});
  const ReplacementCost cost{.size = size_of_model(1, 5), .bases = 1, .rank = 1};
  const auto at = [&](double p) { return select_by_threshold(s, {}, cost, p).replaced[0]; };
  EXPECT_EQ(at(.34), (Slots{3, 1, 2}));
  EXPECT_EQ(at(.10), (Slots{3, 1}));
  EXPECT_EQ(at(.61), (Slots{3, 1, 2, 4, 0}));
  EXPECT_EQ(at(2.0), (Slots{3, 1, 2, 4, 0}));  // nothing exceeds it: everything
  EXPECT_EQ(at(.02), Slots{});                 // one slot, one base: nothing would be saved
}

TEST(Selection, EqualScoresGoToTheLowerSlotFirst) {
  const Statistics s = make_statistics({{1, 1, 1, 1}}, {1});
  const ReplacementCost cost{.size = size_of_model(1, 4), .bases = 1, .rank = 1};
  EXPECT_EQ(select_by_threshold(s, {}, cost, .5).replaced[0], (Slots{0, 1, 2}));
}

TEST(Selection, BisectionMeetsTheBudgetAndNoMore) {
  const Statistics s = make_statistics({{40, 10, 20, 5, 25}, {20, 21, 19, 22, 18}, {1, 2, 4, 8, 16}}, {1, 2, 3});
  const ReplacementCost cost{.size = size_of_model(3, 5), .bases = 1, .rank = 1};
  const int64_t least = cost.size.rest + 3 * cost.layer_parameters(5);
  for (int64_t target = least; target <= cost.size.total(); target += 113) {
    const Selection chosen = select_slots(s, {}, cost, target);
    const auto size = [&](const Selection& selection) {
      int64_t sum = cost.size.rest;
      for (const auto& slots : selection.replaced) sum += cost.layer_parameters(static_cast<int64_t>(slots.size()));
      return sum;
    };
    EXPECT_LE(size(chosen), target);
    if (chosen.base_threshold > 0) {  // a hair less does not fit
      EXPECT_GT(size(select_by_threshold(s, {}, cost, chosen.base_threshold * (1 - 1e-12))), target);
    }
  }
}

TEST(Selection, NothingIsReplacedWhenTheModelFits) {
  const Statistics s = make_statistics({{1, 2, 3, 4}}, {1});
  const ReplacementCost cost{.size = size_of_model(1, 4), .bases = 1, .rank = 1};
  const Selection chosen = select_slots(s, {}, cost, cost.size.total());
  EXPECT_EQ(chosen.replaced, (std::vector<Slots>{{}}));
  EXPECT_EQ(chosen.base_threshold, 0);
}

TEST(Selection, UniformTakesTheSameNumberEverywhere) {
  const Statistics s = make_statistics({{40, 10, 20, 5, 25}, {20, 21, 19, 22, 18}}, {1, 9});
  const ReplacementCost cost{.size = size_of_model(2, 5), .bases = 1, .rank = 1};
  // 10 500 in all; three replaced per layer leave 3 experts and 3 adapters of 10: 2 * 3030 + 500 = 6560.
  const Selection chosen = select_slots(s, {.rule = SelectionRule::kUniform}, cost, 6560);
  EXPECT_EQ(chosen.replaced, (std::vector<Slots>{{3, 1, 2}, {4, 2, 0}}));
  EXPECT_EQ(select_slots(s, {.rule = SelectionRule::kUniform}, cost, 6559).replaced[0].size(), 4u);
}

TEST(Selection, StarvedExpertsFollowThePolicy) {
  Statistics s = make_statistics({{0, 2, 3, 5}}, {1});
  s.layers[0].count[0] = 0;
  const ReplacementCost cost{.size = size_of_model(1, 4), .bases = 1, .rank = 1};
  const auto chosen = [&](StarvedPolicy policy) {
    return select_by_threshold(s, {.starved = policy}, cost, .4).replaced[0];
  };
  EXPECT_EQ(chosen(StarvedPolicy::kUnimportant), (Slots{0, 1, 2}));
  EXPECT_EQ(chosen(StarvedPolicy::kKeep), (Slots{1, 2}));
  try {
    chosen(StarvedPolicy::kError);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kNumeric);
    EXPECT_NE(std::string(error.what()).find("layer 0: no calibration token reached experts 0"), std::string::npos);
  }
}

TEST(Grouping, DominantsAreTheMostImportantReplacedSlots) {
  // Replaced 3 1 2 4 with G .05 .10 .20 .25; two bases: dominants 4 and 2; 3 is closer to 2, 1 is closer to 4.
  const std::vector<double> scores = {.40, .10, .20, .05, .25};
  std::vector<double> similarity(25, 0.0);
  similarity[3 * 5 + 2] = .9, similarity[3 * 5 + 4] = .1, similarity[1 * 5 + 2] = -.5, similarity[1 * 5 + 4] = -.4;
  const std::vector<SlotGroup> groups = group_slots({3, 1, 2, 4}, scores, similarity, 2);
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups[0].slots, (Slots{4, 1}));
  EXPECT_EQ(groups[1].slots, (Slots{2, 3}));
  EXPECT_NEAR(groups[0].weights[0], .25 / .35, 1e-15);
  EXPECT_NEAR(groups[0].weights[1], .10 / .35, 1e-15);
  EXPECT_NEAR(groups[1].weights[0], .80, 1e-15);
}

TEST(Grouping, WithoutASampleSlotsAreDealtOutAndZeroScoresWeighEqually) {
  const std::vector<SlotGroup> groups = group_slots({0, 1, 2, 3, 4}, {0, 0, 0, 0, 0, 1}, {}, 3);
  ASSERT_EQ(groups.size(), 3u);
  EXPECT_EQ(groups[0].slots, (Slots{0, 3}));
  EXPECT_EQ(groups[1].slots, (Slots{1, 4}));
  EXPECT_EQ(groups[2].slots, (Slots{2}));
  EXPECT_EQ(groups[0].weights, (std::vector<double>{.5, .5}));
}

OlmoeConfig olmoe_1b_7b() {
  OlmoeConfig c;
  c.vocab_size = 50304, c.hidden_size = 2048, c.intermediate_size = 1024, c.num_layers = 16;
  c.num_heads = c.num_kv_heads = 16, c.num_experts = 64, c.num_experts_per_token = 8;
  return c;
}

TEST(Budget, CountsTheParametersOfOlmoe) {
  const ModelSize size = model_size(olmoe_1b_7b());
  EXPECT_EQ(size.expert, 6291456);
  EXPECT_EQ(size.total(), 6919161856);  // the published checkpoint: 6.92 B
  EXPECT_NEAR(static_cast<double>(size.total()) * 2 * 0x1p-30, 12.89, .005);
}

TEST(Budget, MatchesThePublishedSizes) {
  const ReplacementCost cost{.size = model_size(olmoe_1b_7b()), .bases = 3, .rank = 16};
  struct Row {
    double ratio;
    int64_t replaced;
    double billions;
  };
  // The paper gives N' as an average over layers and tasks; the totals come from other roundings of it, hence 1 %.
  for (const Row& row : {Row{.3, 24, 4.82}, Row{.4, 31, 4.14}, Row{.5, 38, 3.47}}) {
    const int64_t total = cost.size.rest + 16 * cost.layer_parameters(row.replaced);
    EXPECT_NEAR(static_cast<double>(total) * 1e-9, row.billions, .01 * row.billions);
    const int64_t target = target_parameters({.value = row.ratio}, cost, 2);
    const Selection chosen =
        select_slots(uniform_statistics(16, 64, 2048), {.rule = SelectionRule::kUniform}, cost, target);
    EXPECT_NEAR(static_cast<double>(chosen.replaced[0].size()), static_cast<double>(row.replaced), 1);
  }
}

TEST(Budget, KindsAgree) {
  const ReplacementCost cost{.size = size_of_model(2, 5), .bases = 1, .rank = 1};
  EXPECT_EQ(target_parameters({BudgetKind::kWholeModel, .2}, cost, 2), 8400);
  EXPECT_EQ(target_parameters({BudgetKind::kExperts, .2}, cost, 2), 8500);
  EXPECT_EQ(target_parameters({BudgetKind::kGib, 16800 * 0x1p-30}, cost, 2), 8400);
  EXPECT_EQ(target_parameters({BudgetKind::kExpertsPerLayer, 3}, cost, 2), 6560);
  EXPECT_EQ(target_parameters({BudgetKind::kExpertsPerLayer, 5}, cost, 2), cost.size.total());
  EXPECT_EQ(target_parameters({BudgetKind::kGib, 100}, cost, 2), cost.size.total());  // fits already
}

TEST(Budget, ImpossibleOnesAreRefusedWithTheNearestPossible) {
  const ReplacementCost cost{.size = size_of_model(2, 5), .bases = 1, .rank = 1};
  const auto refused = [&](Budget budget, const char* message) {
    try {
      target_parameters(budget, cost, 2);
      ADD_FAILURE() << describe(budget) << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kUsage);
      EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
    }
  };
  refused({BudgetKind::kWholeModel, .9}, "75.2 % removed");  // 2600 of 10500 remain
  refused({BudgetKind::kWholeModel, 1}, "from 0 to less than 1");
  refused({BudgetKind::kWholeModel, -.1}, "from 0 to less than 1");
  refused({BudgetKind::kWholeModel, NAN}, "from 0 to less than 1");
  refused({BudgetKind::kGib, 1e-9}, "is impossible");
  refused({BudgetKind::kExpertsPerLayer, 0}, "from 1");
  refused({BudgetKind::kExpertsPerLayer, 2.5}, "an integer");
}

TEST(Budget, CountsWhatIsStored) {
  ModelSize size = size_of_model(1, 4);
  size.hidden = 20, size.width = 10;  // an expert is 3 x 20 x 10 = 600, rank 1 is 3 (20 + 10) = 90
  LayerShape layer = plain_layer_shape(4);
  EXPECT_EQ(stored_parameters(layer, size), 2400);
  layer.zero_expert = {0, 0, 1};
  layer.adapter_rank = {16, 3};
  EXPECT_EQ(stored_parameters(layer, size), 1200 + 19 * 90);
  EXPECT_EQ(stored_parameters(std::vector{layer}, size), size.rest + 1200 + 19 * 90);
}

}  // namespace
}  // namespace lightmoe
