// UNCURL, Diversify, LorExperts, LightMoE without training and buddies: exact cases, bytes, export, recovery.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "compress/linear_algebra.h"
#include "compress/merging.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"
#include "tests/support/tiny_experts.h"

namespace lightmoe {
namespace {

using testing::TinyModel;

void add_sample(TinyModel& tiny, const std::vector<std::vector<float>>& logits) {
  for (size_t t = 0; t < logits.size(); ++t) {
    tiny.statistics.sample_token.push_back(static_cast<int64_t>(t)), tiny.statistics.sample_sequence.push_back(0);
    LayerStatistics& layer = tiny.statistics.layers[0];
    layer.sample_logits.insert(layer.sample_logits.end(), logits[t].begin(), logits[t].end());
    for (int i = 0; i < 4; ++i)
      layer.sample_inputs.push_back(std::cos(static_cast<float>(3 * static_cast<int>(t) + i)));
  }
}

// Router logits of 0 and 2 are proportional, those of 1 and 3 too, and the pairs are opposite: two spectral clusters.
TEST(Uncurl, ByHand) {
  TinyModel tiny(1, [](int64_t, int64_t e, ExpertMatrix, int64_t, int64_t) { return static_cast<float>(e); });
  tiny.statistics.layers[0].count = {1, 2, 3, 2};
  add_sample(tiny, {{1, -1, 2, -3}, {2, -2, 4, -6}, {-1, 1, -2, 3}});
  const LayerPlan plan = tiny.plan("uncurl").layers[0];
  ASSERT_EQ(plan.bank.size(), 2u);
  EXPECT_EQ(plan.bank[0].experts, (std::vector<int32_t>{2, 0}));  // the most used first
  EXPECT_EQ(plan.bank[0].weights, (std::vector<double>{.75, .25}));
  EXPECT_EQ(plan.bank[1].experts, (std::vector<int32_t>{1, 3}));
}

// Expert 3 is expert 0 times two: CKA 1. Their router rows are averaged and slot 3 goes.
TEST(Diversify, ByHand) {
  const auto weights = [](int64_t, int64_t e, ExpertMatrix matrix, int64_t row, int64_t column) {
    const double twice = e == 3 && matrix == ExpertMatrix::kDown ? 2 : 1;
    return static_cast<float>(twice * std::sin(static_cast<double>(11 * (e % 3) + 3 * row + column)));
  };
  TinyModel tiny(1, weights);
  add_sample(tiny, {{1, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 0}, {1, 0, 0, 1}, {0, 0, 1, 1}});
  tiny.options.budget = {BudgetKind::kExpertsPerLayer, 3};
  const Plan plan = tiny.plan("diversify");
  EXPECT_EQ(plan.layers[0].bank[0].experts, (std::vector<int32_t>{0, 3}));
  EXPECT_EQ(plan.layers[0].shape.slots[3].kind, SlotKind::kRemoved);
  const Tensor before = tiny.experts->router(0).read(DType::kF64);
  const Tensor after = plan.computed.at("model.layers.0.mlp.gate.weight")();
  for (int64_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(after.data<double>()[i], (before.data<double>()[i] + before.data<double>()[12 + i]) / 2, 1e-15);
    EXPECT_EQ(after.data<double>()[4 + i], before.data<double>()[4 + i]);
  }
}

// Member = medoid with shuffled units plus a difference of rank one: medoid and one term give it back, units in the medoid's order.
TEST(LorExperts, ExactForAShuffledMember) {
  const auto weights = [](int64_t, int64_t e, ExpertMatrix matrix, int64_t row, int64_t column) {
    const bool down = matrix == ExpertMatrix::kDown;
    const int64_t unit = down ? column : row, other = down ? row : column;
    const int64_t source = e == 1 ? 1 - unit : unit;  // expert 1: the units of expert 0, exchanged
    const int64_t like = e == 1 ? 0 : e;
    const double change = e == 1 ? .01 * static_cast<double>((source + 1) * (other + 1)) : 0;
    return static_cast<float>(std::sin(static_cast<double>(13 * like + 5 * source + other + 2 * down)) + change);
  };
  TinyModel tiny(1, weights);
  tiny.statistics.layers[0].count = {9, 1, 8, 7};
  add_sample(tiny, {{5, 4, 0, 0}, {5, 4, 0, 0}, {0, 0, 5, 4}, {5, 0, 4, 0}});
  const ModelSize size = model_size(tiny.config);
  const auto target = static_cast<double>(size.rest + 3 * size.expert + size.adapter_unit);
  tiny.options.budget = {BudgetKind::kWholeModel, 1 - (target + .5) / static_cast<double>(size.total())};
  const Plan plan = tiny.plan("lor-experts");
  ASSERT_EQ(plan.layers[0].adapter_slot, (std::vector<int32_t>{1}));
  EXPECT_EQ(plan.layers[0].shape.slots[1].expert, plan.layers[0].shape.slots[0].expert);
  const ExpertMatrices medoid = read_expert(*tiny.experts, 0, 0, DType::kF64),
                       member = read_expert(*tiny.experts, 0, 1, DType::kF64);
  const auto with_term = [&](const Tensor& w, ExpertMatrix matrix) {
    const Tensor made = product(plan.computed.at(adapter_tensor_name(0, 0, matrix, true))(), false,
                                plan.computed.at(adapter_tensor_name(0, 0, matrix, false))(), false);
    for (int64_t i = 0; i < w.numel(); ++i) made.data<double>()[i] += w.data<double>()[i];
    return made;
  };
  const ExpertMatrices made{.gate = with_term(medoid.gate, ExpertMatrix::kGate),
                            .up = with_term(medoid.up, ExpertMatrix::kUp),
                            .down = with_term(medoid.down, ExpertMatrix::kDown)};
  const Tensor x = testing::random_tensor({5, 4}, DType::kF64, 3);
  EXPECT_TRUE(testing::close(expert_output(made, expert_hidden(made, x)),
                             testing::to_doubles(expert_output(member, expert_hidden(member, x))), 1e-5));
}

// Two slots are resident (0 and 2, the most used). 1 is chosen with 2 twice and with 0 once; 3 never with a resident: the most used.
TEST(BuddyMoe, ByHand) {
  TinyModel tiny(1, [](int64_t, int64_t e, ExpertMatrix, int64_t, int64_t) { return static_cast<float>(e); });
  tiny.statistics.layers[0].count = {5, 3, 4, 1};
  add_sample(tiny, {{5, 4, 0, 0}, {0, 4, 5, 0}, {0, 5, 4, 0}, {0, 4, 0, 5}});
  const LayerPlan plan = tiny.plan("buddy-moe").layers[0];
  const std::vector<int32_t> expected = {0, 1, 1, 0};
  for (size_t s = 0; s < 4; ++s) EXPECT_EQ(plan.shape.slots[s].expert, expected[s]) << s;
  EXPECT_TRUE(plan.bank[0].is_copy());
  EXPECT_EQ(plan.bank[1].experts, (std::vector<int32_t>{2}));
}

// The terms bring every replaced expert nearer to what it was; on the inputs that occur, the whitened ones bring it nearest.
TEST(LightMoeFree, TheTermsAreTheResiduals) {
  const testing::CompressionGround& ground = testing::CompressionGround::demo();
  const OlmoeConfig config = read_config(ground.model);
  const Checkpoint checkpoint(ground.model);
  const ExpertSource experts(checkpoint, config);
  MethodOptions options;
  options.budget = {BudgetKind::kExperts, .4};
  options.bases = 2, options.rank = 4;
  const MethodInput input{.config = config, .statistics = ground.statistics, .options = options, .experts = &experts};
  double weights[2] = {0, 0}, outputs[2] = {0, 0}, base_weights = 0;
  for (const bool whitened : {false, true}) {
    const Plan plan = find_method(whitened ? "lightmoe-free-w" : "lightmoe-free").plan(input);
    const LayerPlan& layer = plan.layers[0];
    for (size_t a = 0; a < layer.adapter_slot.size(); ++a) {
      const int32_t slot = layer.adapter_slot[a];
      const BankEntry& base = layer.bank[static_cast<size_t>(layer.shape.slots[static_cast<size_t>(slot)].expert)];
      const auto name = [&](bool b) { return adapter_tensor_name(0, static_cast<int64_t>(a), ExpertMatrix::kGate, b); };
      const Tensor residual = experts.place(0, slot, ExpertMatrix::kGate).read(DType::kF64);
      for (size_t i = 0; i < base.experts.size(); ++i) {
        const Tensor w = experts.place(0, base.experts[i], ExpertMatrix::kGate).read(DType::kF64);
        for (int64_t k = 0; k < w.numel(); ++k) residual.data<double>()[k] -= base.weights[i] * w.data<double>()[k];
      }
      if (!whitened) {
        for (const double v : testing::to_doubles(residual)) base_weights += v * v;
      }
      const Tensor term = product(plan.computed.at(name(true))(), false, plan.computed.at(name(false))(), false);
      for (int64_t k = 0; k < term.numel(); ++k) residual.data<double>()[k] -= term.data<double>()[k];
      const Tensor x = routed_rows(layer_sample(input, 0), {slot}).to(DType::kF64);
      for (const double v : testing::to_doubles(residual)) weights[whitened] += v * v;
      for (const double v : testing::to_doubles(product(x, false, residual, true))) outputs[whitened] += v * v;
    }
  }
  EXPECT_LT(weights[0], base_weights);
  EXPECT_LT(weights[0], weights[1]);
  EXPECT_LT(outputs[1], outputs[0]);
}

// Redirected, what a group's expert stands for points to it, no row is merged or masked; one expert a layer may be left.
TEST(Groups, RedirectedMergesTieTheirSlots) {
  const testing::CompressionGround& ground = testing::CompressionGround::golden();
  const testing::TempDir where;
  const auto redirect = [](MethodOptions& o) { o.redirect = true; };
  for (const char* method : {"ream", "diversify"}) {
    SCOPED_TRACE(method);
    const CompressionRecord masked = ground.compress(method, .5, where / "masked"),
                            tied = ground.compress(method, .5, where / "tied", redirect);
    EXPECT_EQ(tied.stored_parameters, masked.stored_parameters);
    for (size_t l = 0; l < tied.plan.layers.size(); ++l) {
      const LayerPlan &a = masked.plan.layers[l], &b = tied.plan.layers[l];
      for (size_t s = 0; s < 64; ++s) {
        ASSERT_EQ(b.shape.slots[s].kind, SlotKind::kExpert);
        const std::vector<int32_t>& members = b.bank[static_cast<size_t>(b.shape.slots[s].expert)].experts;
        EXPECT_NE(std::find(members.begin(), members.end(), static_cast<int32_t>(s)), members.end()) << s;
      }
      ASSERT_EQ(a.bank.size(), b.bank.size());
      for (size_t j = 0; j < a.bank.size(); ++j) {
        const auto same = [&](const BankEntry& e) { return e.experts == a.bank[j].experts; };
        EXPECT_TRUE(std::any_of(b.bank.begin(), b.bank.end(), same)) << j;
      }
      const std::string router = fmt::format("model.layers.{}.mlp.gate.weight", l);
      const Checkpoint before(ground.model), after(where / "tied");
      EXPECT_TRUE(testing::bits_equal(before.file_of(router).read(router), after.file_of(router).read(router)));
    }
    EXPECT_EQ(ground.compress(method, 63. / 64, where / "one", redirect).plan.layers[0].bank.size(), 1u);
  }
  CompressJob job{.model = ground.model, .output = "unused", .method = "hc-smoe"};
  job.options.redirect = true;
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"hc-smoe takes no --redirect", "ream"},
                                  [&] { estimate_compression(job); }));
}

// Whitened factors are as long as each other, rank by rank, as those of a plain SVD are.
TEST(LightMoeFree, WhitenedFactorsAreBalanced) {
  const testing::CompressionGround& ground = testing::CompressionGround::demo();
  const OlmoeConfig config = read_config(ground.model);
  const Checkpoint checkpoint(ground.model);
  const ExpertSource experts(checkpoint, config);
  MethodOptions options;
  options.budget = {BudgetKind::kExperts, .4};
  options.bases = 2, options.rank = 4;
  const MethodInput input{.config = config, .statistics = ground.statistics, .options = options, .experts = &experts};
  for (const char* method : {"lightmoe-free", "lightmoe-free-w"}) {
    const Plan plan = find_method(method).plan(input);
    for (const ExpertMatrix matrix : kExpertMatrices) {
      const Tensor b = plan.computed.at(adapter_tensor_name(0, 0, matrix, true))(),
                   a = plan.computed.at(adapter_tensor_name(0, 0, matrix, false))();
      for (int64_t r = 0; r < 4; ++r) {
        double bb = 0, aa = 0;
        for (int64_t i = 0; i < b.dim(0); ++i) bb += b.data<double>()[i * 4 + r] * b.data<double>()[i * 4 + r];
        for (const double v : testing::to_doubles(a.row(r))) aa += v * v;
        EXPECT_NEAR(aa, bb, 1e-9 * bb) << method;
        EXPECT_GT(bb, 0);
      }
    }
  }
}

const std::vector<std::string> kAll = {"uncurl",    "diversify",     "lor-experts",
                                       "buddy-moe", "lightmoe-free", "lightmoe-free-w"};

TEST(Groups, IdentityAtRatioZero) {
  for (const std::string& method : kAll) testing::expect_identity_at_zero(method);
}
TEST(Groups, BytesReallyFall) {
  for (const std::string& method : kAll) testing::expect_bytes_saved(method, .3);
}
TEST(Groups, ExportsTheSameFunction) {
  for (const char* method : {"diversify", "lor-experts", "lightmoe-free"}) {
    testing::expect_export_is_the_same(method, .3);
  }
}
TEST(Groups, DemoLoss) {
  for (const std::string& method : kAll) testing::expect_useful_on_demo(method);
}

}  // namespace
}  // namespace lightmoe
