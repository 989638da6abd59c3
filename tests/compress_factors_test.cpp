// MoLAE, D2-MoE, MoNE, NAEE (greedy) and REAM: exact cases, what they minimise, bytes, export, recovery.

#include <gtest/gtest.h>

#include <cmath>

#include "compress/exporter.h"
#include "compress/linear_algebra.h"
#include "compress/residuals.h"
#include "model/summary.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"
#include "tests/support/tiny_experts.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;
using testing::TempDir;
using testing::TinyModel;

// MoNE on one layer: outputs with the same gates, expert 2 always says the same.
TEST(Mone, ByHand) {
  TinyModel tiny(1, [](int64_t, int64_t, ExpertMatrix, int64_t, int64_t) { return 1.f; });
  LayerStatistics& layer = tiny.statistics.layers[0];
  layer.count = {2, 2, 2, 0};
  layer.gate_mass = {1, 1, 1, 0};
  // f of expert 0: (1,0,0,0), (3,0,0,0): mean 2, variance 1.  1: (0,4,0,0) and (0,-4,0,0): variance 16.  2: (5,5,5,5) twice: 0.
  layer.routed_output = {4, 0, 0, 0, 0, 0, 0, 0, 10, 10, 10, 10, 0, 0, 0, 0};
  layer.routed_output2 = {10, 0, 0, 0, 0, 32, 0, 0, 50, 50, 50, 50, 0, 0, 0, 0};
  const Plan plan = tiny.plan("mone");
  const std::vector<SlotKind> kinds = {SlotKind::kExpert, SlotKind::kExpert, SlotKind::kConstant, SlotKind::kConstant};
  for (size_t s = 0; s < 4; ++s) EXPECT_EQ(plan.layers[0].shape.slots[s].kind, kinds[s]) << s;
  const Tensor table = plan.computed.at(constants_tensor_name(0))();
  EXPECT_EQ(testing::to_doubles(table), (std::vector<double>{5, 5, 5, 5, 0, 0, 0, 0}));
  const ModelSize size = model_size(tiny.config);
  EXPECT_EQ(stored_parameters(plan.shapes(), size), size.total() - 2 * size.expert + 2 * 4);
}

TEST(Mone, ConstantsCountTowardsTheBudget) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const CompressionRecord record = ground.compress("mone", .5, where / "out");
  const ModelSize size = model_size(read_config(ground.model));
  EXPECT_LE(record.stored_parameters, size.total() - size.all_experts() / 2);
  EXPECT_EQ(record.plan.layers[0].shape.constants, 64 - static_cast<int64_t>(record.plan.layers[0].bank.size()));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kInput, {"a constant"}, [&] {
    export_to_hugging_face({.model = where / "out", .output = where / "stock"});
  }));
  const ModelSummary summary = summarize_model(where / "out");
  EXPECT_EQ(summary.layers[0].constant_slots, record.plan.layers[0].shape.constants);
}

// Experts whose gate and up rows lie in one plane are exact at M = 2.
TEST(Molae, ExactWhenTheRowsSpanFewDirections) {
  const auto weights = [](int64_t, int64_t expert, ExpertMatrix matrix, int64_t row, int64_t column) {
    const double a = 1 + static_cast<double>(expert * 2 + row), b = 3 - static_cast<double>(expert + 3 * row);
    constexpr double kFirst[] = {1, 2, 0, -1}, kSecond[] = {0, 1, 1, 3};
    if (matrix == ExpertMatrix::kDown) return static_cast<float>(expert + row + 10 * column);
    return static_cast<float>(a * kFirst[column] + b * kSecond[column]);
  };
  TinyModel tiny(1, weights);
  const ModelSize size = model_size(tiny.config);
  // 4 experts of 2 x 4: down 4*8 stays; M = 2 costs 2*2*4 shared + 4*2*2*2 private = 48 instead of 64 for gate and up.
  tiny.options.budget = {BudgetKind::kExperts, 15.5 / 96};
  const Plan plan = tiny.plan("molae");
  ASSERT_EQ(plan.layers[0].shape.latent_size, 2);
  EXPECT_EQ(stored_parameters(plan.shapes(), size), size.total() - 16);
  for (const ExpertMatrix matrix : {ExpertMatrix::kGate, ExpertMatrix::kUp}) {
    const Tensor b = plan.computed.at(projection_tensor_name(0, 0, matrix))();
    for (int64_t e = 0; e < 4; ++e) {
      const Tensor a = plan.computed.at(latent_tensor_name(0, e, matrix))();
      const Tensor w = tiny.experts->place(0, e, matrix).read(DType::kF64);
      EXPECT_TRUE(testing::close(product(a, false, b, false), testing::to_doubles(w), 1e-12));
    }
  }
  tiny.options.budget = {BudgetKind::kExperts, .9};
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"impossible for molae", "down matrices stay"},
                                  [&] { tiny.plan("molae"); }));
}

// Whitened factors lose more of the weights and less of the outputs.
TEST(Molae, WhiteningServesTheInputs) {
  const CompressionGround& ground = CompressionGround::demo();
  const OlmoeConfig config = read_config(ground.model);
  const Checkpoint checkpoint(ground.model);
  const ExpertSource experts(checkpoint, config);
  MethodOptions options;
  options.budget = {BudgetKind::kExperts, .4};
  const MethodInput input{.config = config, .statistics = ground.statistics, .options = options, .experts = &experts};
  const Tensor& x = Tensor::borrow(const_cast<float*>(ground.statistics.layers[0].sample_inputs.data()),
                                   {ground.statistics.sample_size(), config.hidden_size}, DType::kF32)
                        .to(DType::kF64);
  const auto errors = [&](const char* method) {
    const Plan plan = find_method(method).plan(input);
    const Tensor w = experts.place(0, 3, ExpertMatrix::kGate).read(DType::kF64);
    const Tensor made = product(plan.computed.at(latent_tensor_name(0, 3, ExpertMatrix::kGate))(), false,
                                plan.computed.at(projection_tensor_name(0, 0, ExpertMatrix::kGate))(), false);
    for (int64_t i = 0; i < w.numel(); ++i) made.data<double>()[i] -= w.data<double>()[i];
    double weights = 0, outputs = 0;
    for (const double v : testing::to_doubles(made)) weights += v * v;
    for (const double v : testing::to_doubles(product(x, false, made, true))) outputs += v * v;
    return std::pair{weights, outputs};
  };
  const auto plain = errors("molae"), whitened = errors("molae-whitened");
  EXPECT_LT(plain.first, whitened.first);
  EXPECT_LT(whitened.second, plain.second);
}

// All experts alike but for a difference of rank one: base plus rank 1 is exact.
TEST(D2Moe, ExactForRankOneDifferences) {
  const auto weights = [](int64_t, int64_t expert, ExpertMatrix matrix, int64_t row, int64_t column) {
    const double common =
        .3 * static_cast<double>(row) - .2 * static_cast<double>(column) + (matrix == ExpertMatrix::kUp ? 1 : 0);
    return static_cast<float>(common + static_cast<double>(expert) * static_cast<double>(row + 1) *
                                           (1 + .5 * static_cast<double>(column)));
  };
  TinyModel tiny(1, weights);
  // A base for four experts of this size saves nothing, so the plan is made here; the method's arithmetic is tested on larger ones.
  Plan plan;
  plan.layers = {table_plan(4, {{{0, 1, 2, 3}, {{0, 1, 2, 3}, {.25, .25, .25, .25}}}})};
  for (int32_t s = 0; s < 4; ++s) {
    plan.layers[0].shape.slots[static_cast<size_t>(s)].adapter = s;
    plan.layers[0].shape.adapter_rank.push_back(1);
    plan.layers[0].adapter_slot.push_back(s);
  }
  const MethodInput input = tiny.input();
  add_residual_adapters(plan, input, true);  // no sample: the Gram matrices are the identity
  for (const ExpertMatrix matrix : kExpertMatrices) {
    std::vector<double> base(8, 0.0);
    for (int64_t e = 0; e < 4; ++e) {
      const std::vector<double> w = testing::to_doubles(tiny.experts->place(0, e, matrix).read(DType::kF64));
      for (size_t i = 0; i < 8; ++i) base[i] += .25 * w[i];
    }
    for (int32_t e = 0; e < 4; ++e) {
      const Tensor b = plan.computed.at(adapter_tensor_name(0, e, matrix, true))(),
                   a = plan.computed.at(adapter_tensor_name(0, e, matrix, false))();
      std::vector<double> made = testing::to_doubles(product(b, false, a, false));
      for (size_t i = 0; i < 8; ++i) made[i] += base[i];
      EXPECT_TRUE(testing::close(tiny.experts->place(0, e, matrix).read(DType::kF64), made, 1e-6)) << e;
    }
  }
}

// One expert that says nothing (down = 0): the greedy search removes it first, whatever the router thinks of it.
TEST(NaeeGreedy, RemovesWhatTheOutputDoesNotMiss) {
  const auto weights = [](int64_t, int64_t expert, ExpertMatrix matrix, int64_t row, int64_t column) {
    if (matrix == ExpertMatrix::kDown && expert == 1) return 0.f;
    return static_cast<float>(std::sin(static_cast<double>(7 * expert + 3 * row + column)));
  };
  TinyModel tiny(1, weights);
  tiny.options.budget = {BudgetKind::kExpertsPerLayer, 3};
  LayerStatistics& layer = tiny.statistics.layers[0];
  for (int t = 0; t < 6; ++t) {
    tiny.statistics.sample_token.push_back(t), tiny.statistics.sample_sequence.push_back(0);
    for (const float z : {1.f, -6.f, .5f, .8f}) layer.sample_logits.push_back(z + .1f * static_cast<float>(t));
    for (int i = 0; i < 4; ++i) layer.sample_inputs.push_back(std::cos(static_cast<float>(3 * t + i)));
  }
  EXPECT_EQ(tiny.plan("naee-greedy").layers[0].replaced, (std::vector<int32_t>{1}));
}

// The centroid of the two most salient absorbs the others, whose router rows go.
TEST(Ream, GroupsAroundTheSalient) {
  const auto weights = [](int64_t, int64_t expert, ExpertMatrix, int64_t row, int64_t column) {
    const int64_t like = expert == 3 ? 0 : expert;  // 3 equals 0
    return static_cast<float>(std::sin(static_cast<double>(11 * like + 3 * row + column)));
  };
  TinyModel tiny(1, weights);
  LayerStatistics& layer = tiny.statistics.layers[0];
  layer.count = {1, 1, 1, 1};
  layer.gate_output_norm = {4, 3, 1, 2};
  for (int t = 0; t < 6; ++t) {
    tiny.statistics.sample_token.push_back(t), tiny.statistics.sample_sequence.push_back(0);
    for (const float z : {1.f, -1.f, .5f, 1.f}) layer.sample_logits.push_back(z + .1f * static_cast<float>(t));
    for (int i = 0; i < 4; ++i) layer.sample_inputs.push_back(std::cos(static_cast<float>(3 * t + i)));
  }
  tiny.options.budget = {BudgetKind::kExpertsPerLayer, 2};
  const LayerPlan plan = tiny.plan("ream").layers[0];
  ASSERT_EQ(plan.bank.size(), 2u);
  EXPECT_EQ(plan.bank[0].experts, (std::vector<int32_t>{0, 3, 2}));  // its twin first, then what is left
  EXPECT_EQ(plan.bank[1].experts, (std::vector<int32_t>{1}));
  EXPECT_EQ(plan.shape.slots[2].kind, SlotKind::kRemoved);
  EXPECT_EQ(plan.shape.slots[3].kind, SlotKind::kRemoved);
  EXPECT_NEAR(plan.bank[0].weights[1], 2. / 7, 1e-15);
}

const std::vector<std::string> kAll = {"mone", "molae", "molae-whitened", "d2-moe", "naee-greedy", "ream"};

// Terms of 4 slots at rank R: b_gate, b_up [F,R], a_down [R,F] are 4 * 2 R, b_down [D,R] 4 * 4 R, a_gate_up [2R,D] 4 * 8 R; the base is 24.
TEST(D2Moe, TrainsAsMuchAsLightMoe) {
  TinyModel tiny(1, [](int64_t, int64_t e, ExpertMatrix, int64_t row, int64_t column) {
    return static_cast<float>(std::sin(static_cast<double>(11 * e + 3 * row + column)));
  });
  tiny.options.budget = {BudgetKind::kExperts, .2};  // 76 of 96: a base of 24 and rank 2 of 18 each would be 168
  const Method& method = find_method("d2-moe");
  Plan plan;
  plan.layers = {table_plan(4, {{{0, 1, 2, 3}, {{0, 1, 2, 3}, {.25, .25, .25, .25}}}})};
  for (int32_t s = 0; s < 4; ++s) {
    plan.layers[0].shape.slots[static_cast<size_t>(s)].adapter = s;
    plan.layers[0].shape.adapter_rank.push_back(2);
    plan.layers[0].adapter_slot.push_back(s);
  }
  const auto factors_at = [&](int64_t bases, int64_t rank) {
    tiny.options.bases = bases, tiny.options.rank = rank;
    const MethodInput input = tiny.input();
    return std::pair{trained_factors(method, input, plan), trainable_parameters(method, input, plan)};
  };
  // LightMoE with one base of 24 and rank R has 24 + 4 * 18 R.
  EXPECT_EQ(factors_at(1, 1),
            (std::pair<uint8_t, int64_t>{kBGate | kBUp | kBDown, 24 + 64}));  // 72 wanted: 64 and 80 as near
  EXPECT_EQ(factors_at(1, 2), (std::pair<uint8_t, int64_t>{kAllFactors, 24 + 144}));
  EXPECT_EQ(trained_factors(find_method("lightmoe"), tiny.input(), plan), kAllFactors);
}

TEST(Factors, IdentityAtRatioZero) {
  for (const std::string& method : kAll) testing::expect_identity_at_zero(method);
}
TEST(Factors, BytesReallyFall) {
  for (const std::string& method : kAll) testing::expect_bytes_saved(method, .3);
}
TEST(Factors, ExportsTheSameFunction) {
  for (const char* method : {"molae", "d2-moe", "ream"}) testing::expect_export_is_the_same(method, .3);
}
TEST(Factors, DemoLoss) {
  for (const std::string& method : kAll) testing::expect_useful_on_demo(method);
}
TEST(Factors, Recover) {
  testing::expect_recovers("molae", .3, 1 << 20);  // the adapters of latent slots stay
  testing::expect_recovers("mone", .3, 0);
  testing::expect_recovers("d2-moe", .3, 0);
}

}  // namespace
}  // namespace lightmoe
