// The merging family: groups worked by hand, alignment, the refit, bytes, export, recovery.

#include "compress/merging.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "compress/linear_algebra.h"
#include "compress/recover.h"
#include "compress/svd.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"
#include "tests/support/tiny_experts.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;
using testing::TempDir;
using testing::TinyModel;

const std::vector<std::string> kFamily = {"m-smoe", "m-smoe-refit", "hc-smoe", "hc-smoe-refit", "mergemoe", "sub-moe"};

float constant_weights(int64_t, int64_t expert, ExpertMatrix, int64_t, int64_t) { return static_cast<float>(expert); }

std::vector<std::vector<int32_t>> members(const LayerPlan& layer) {
  std::vector<std::vector<int32_t>> out;
  for (const BankEntry& entry : layer.bank) {
    out.push_back(entry.experts);
    std::sort(out.back().begin(), out.back().end());
  }
  return out;
}

// Mean outputs on a line: experts 0 and 2 near each other, 1 and 3 likewise; used 3, 1, 1, 0 times.
TEST(Merging, HcSmoeByHand) {
  TinyModel tiny(1, &constant_weights);
  LayerStatistics& layer = tiny.statistics.layers[0];
  layer.count = {3, 1, 1, 0};
  layer.all_output = {1, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0, 0, 7, 0, 0, 0};
  const Plan plan = tiny.plan("hc-smoe");
  EXPECT_EQ(members(plan.layers[0]), (std::vector<std::vector<int32_t>>{{0, 2}, {1, 3}}));
  EXPECT_EQ(plan.layers[0].bank[0].weights, (std::vector<double>{.75, .25}));
  EXPECT_EQ(plan.layers[0].bank[1].weights, (std::vector<double>{1, 0}));
  const std::vector<int32_t> expected = {0, 1, 0, 1};
  for (size_t s = 0; s < 4; ++s) EXPECT_EQ(plan.layers[0].shape.slots[s].expert, expected[s]);
  EXPECT_EQ(plan.layers[0].replaced.size(), 4u);
}

// Usage relative to each layer's largest: layer 0 has 1, .9, .8, .1, layer 1 has 1, .5, .05, .01; five experts stay in all.
TEST(Merging, MSmoeCountsOverAllLayers) {
  TinyModel tiny(2, &constant_weights);
  tiny.statistics.layers[0].count = {90, 100, 10, 80};
  tiny.statistics.layers[1].count = {5, 1, 100, 50};
  const ModelSize size = model_size(tiny.config);
  tiny.options.budget = {BudgetKind::kExperts, 3. / 8};
  const Plan plan = tiny.plan("m-smoe");
  EXPECT_EQ(plan.layers[0].bank.size(), 3u);
  EXPECT_EQ(plan.layers[1].bank.size(), 2u);
  EXPECT_EQ(stored_parameters(plan.shapes(), size), size.total() - 3 * size.expert);
}

TEST(Merging, SubMoeGroupsByDirection) {
  TinyModel tiny(1, &constant_weights);
  LayerStatistics& layer = tiny.statistics.layers[0];
  layer.count = {1, 1, 3, 1};
  layer.all_output = {1, 0, 0, 0, 0, 2, 0, 0, 5, 0, .1, 0, 0, 1, .1, 0};
  const Plan plan = tiny.plan("sub-moe");
  EXPECT_EQ(members(plan.layers[0]), (std::vector<std::vector<int32_t>>{{0, 2}, {1, 3}}));
  EXPECT_EQ(plan.layers[0].bank[0].weights, (std::vector<double>{.25, .75}));
}

// Gate and up of expert e are s_e times the same rows, s = 1, -1, 1/2, -2, so that 2 joins 0 and 3 joins 1. One sampled token, x = (1, 0, 0, 0),
// reaches the first group: with p the merged hidden activations and q the weighted outputs of its members, the ridge solution is
// W = W_mean + (q - W_mean p) p^T / (lambda + |p|^2), lambda = 0.01 |p|^2 / 2 (Sherman and Morrison). The second group keeps its mean.
TEST(Merging, MergeMoeByHand) {
  constexpr double kScale[] = {1, -1, .5, -2};
  const auto down = [](int64_t expert, int64_t row, int64_t column) {
    return static_cast<double>(expert + row) - 3. * static_cast<double>(column);
  };
  TinyModel tiny(1, [&](int64_t, int64_t expert, ExpertMatrix matrix, int64_t row, int64_t column) {
    if (matrix == ExpertMatrix::kDown) return static_cast<float>(down(expert, row, column));
    const double unit = matrix == ExpertMatrix::kGate ? 1 + static_cast<double>(row) : 2 - static_cast<double>(row);
    return column == 0 ? static_cast<float>(kScale[expert] * unit) : 0.f;
  });
  tiny.statistics.layers[0].count = {3, 2, 1, 0};
  tiny.statistics.sample_token = {0}, tiny.statistics.sample_sequence = {0};
  tiny.statistics.layers[0].sample_logits = {1, -9, .5, -9};
  tiny.statistics.layers[0].sample_inputs = {1, 0, 0, 0};
  const Plan plan = tiny.plan("mergemoe");
  EXPECT_EQ(members(plan.layers[0]), (std::vector<std::vector<int32_t>>{{0, 2}, {1, 3}}));
  EXPECT_EQ(plan.layers[0].bank[0].weights, (std::vector<double>{.75, .25}));

  const auto hidden = [](double scale, double unit) {  // silu(gate) * up
    const double gate = scale * (1 + unit);
    return gate / (1 + std::exp(-gate)) * scale * (2 - unit);
  };
  const double merged = .75 * kScale[0] + .25 * kScale[2];
  const std::vector<double> p = {hidden(merged, 0), hidden(merged, 1)};
  const double norm = p[0] * p[0] + p[1] * p[1];
  std::vector<double> expected;
  for (int64_t row = 0; row < 4; ++row) {
    double missing = 0, mean[2];
    for (int64_t k = 0; k < 2; ++k) {
      mean[k] = .75 * down(0, row, k) + .25 * down(2, row, k);
      missing += .75 * down(0, row, k) * hidden(kScale[0], static_cast<double>(k)) +
                 .25 * down(2, row, k) * hidden(kScale[2], static_cast<double>(k)) -
                 mean[k] * p[static_cast<size_t>(k)];
    }
    for (size_t k = 0; k < 2; ++k) expected.push_back(mean[k] + missing * p[k] / (1.005 * norm));
  }
  const auto made = [&](int64_t entry, ExpertMatrix matrix) {
    return plan.computed.at(bank_tensor_name(0, entry, matrix))();
  };
  EXPECT_TRUE(testing::close(made(0, ExpertMatrix::kGate), {merged, 0, 0, 0, 2 * merged, 0, 0, 0}, 1e-12));
  EXPECT_TRUE(testing::close(made(0, ExpertMatrix::kDown), expected, 1e-12));
  std::vector<double> second;
  for (int64_t row = 0; row < 4; ++row) second.insert(second.end(), {down(1, row, 0), down(1, row, 1)});
  EXPECT_TRUE(testing::close(made(1, ExpertMatrix::kDown), second, 1e-12));
}

// What compress/merge_sub_moe.cpp says: with all singular values the subspace merge is the weighted mean.
TEST(Merging, TheSubspaceMergeIsTheMean) {
  const Tensor w1 = testing::random_tensor({5, 7}, DType::kF64, 1), w2 = testing::random_tensor({5, 7}, DType::kF64, 2);
  const Tensor both = Tensor::empty({5, 14}, DType::kF64);
  for (int64_t i = 0; i < 5; ++i) {
    for (int64_t j = 0; j < 7; ++j) {
      both.data<double>()[i * 14 + j] = w1.data<double>()[i * 7 + j];
      both.data<double>()[i * 14 + 7 + j] = w2.data<double>()[i * 7 + j];
    }
  }
  const LowRank svd = best_low_rank(both, 5, 1);  // b a = U sqrt(S) sqrt(S) V^T
  const Tensor v = Tensor::empty({5, 7}, DType::kF64);
  std::vector<double> mean(35);
  for (int64_t i = 0; i < 5; ++i) {
    for (int64_t j = 0; j < 7; ++j) {
      v.data<double>()[i * 7 + j] = .3 * svd.a.data<double>()[i * 14 + j] + .7 * svd.a.data<double>()[i * 14 + 7 + j];
      mean[static_cast<size_t>(i * 7 + j)] = .3 * w1.data<double>()[i * 7 + j] + .7 * w2.data<double>()[i * 7 + j];
    }
  }
  EXPECT_TRUE(testing::close(product(svd.b, false, v, false), mean, 1e-12));
}

// An expert and the same one with its units shuffled: alignment finds the shuffle, and their mean is the expert.
TEST(Merging, AlignmentUndoesAPermutation) {
  const ExpertMatrices expert{.gate = testing::random_tensor({6, 5}, DType::kF64, 1),
                              .up = testing::random_tensor({6, 5}, DType::kF64, 2),
                              .down = testing::random_tensor({5, 6}, DType::kF64, 3)};
  const std::vector<int32_t> shuffle = {3, 0, 5, 1, 4, 2};
  const ExpertMatrices shuffled = with_units(expert, shuffle);
  const Tensor x = testing::random_tensor({9, 5}, DType::kF64, 4);
  EXPECT_TRUE(testing::close(expert_output(shuffled, expert_hidden(shuffled, x)),
                             testing::to_doubles(expert_output(expert, expert_hidden(expert, x))), 1e-13));
  const std::vector<int32_t> found = aligned_units(expert, shuffled);
  for (size_t i = 0; i < 6; ++i) EXPECT_EQ(shuffle[static_cast<size_t>(found[i])], static_cast<int32_t>(i));
  EXPECT_TRUE(testing::bits_equal(with_units(shuffled, found).down, expert.down));
}

// Squared error of the merged expert against the weighted outputs of its members, on the sampled tokens.
TEST(Merging, RefitLowersTheError) {
  const CompressionGround& ground = CompressionGround::golden();
  const OlmoeConfig config = read_config(ground.model);
  const Checkpoint checkpoint(ground.model);
  const ExpertSource experts(checkpoint, config);
  const MethodOptions options;
  const MethodInput input{.config = config, .statistics = ground.statistics, .options = options, .experts = &experts};
  const BankEntry group{.experts = {3, 8, 21}, .weights = {.5, .3, .2}};
  const Tensor x = routed_rows(layer_sample(input, 0), group.experts).to(DType::kF64);
  const auto error_of = [&](const ExpertMatrices& merged) {
    std::vector<double> wanted(static_cast<size_t>(x.numel()), 0.0);
    for (size_t i = 0; i < 3; ++i) {
      const ExpertMatrices member = read_expert(experts, 0, group.experts[i], DType::kF64);
      const std::vector<double> y = testing::to_doubles(expert_output(member, expert_hidden(member, x)));
      for (size_t k = 0; k < y.size(); ++k) wanted[k] += group.weights[i] * y[k];
    }
    const std::vector<double> y = testing::to_doubles(expert_output(merged, expert_hidden(merged, x)));
    double sum = 0;
    for (size_t k = 0; k < y.size(); ++k) sum += (y[k] - wanted[k]) * (y[k] - wanted[k]);
    return sum;
  };
  const double mean = error_of(merged_expert(input, 0, group, {})),
               refit = error_of(merged_expert(input, 0, group, {.refit = true}));
  EXPECT_LT(refit, .9 * mean);
  // A group that no token reached keeps the mean.
  const BankEntry alone{.experts = {3, 3}, .weights = {.5, .5}};
  const ExpertMatrices same = merged_expert(input, 0, alone, {.align = true, .refit = true});
  EXPECT_TRUE(testing::close(same.down, testing::to_doubles(read_expert(experts, 0, 3, DType::kF64).down), 1e-9));
}

TEST(Merging, IdentityAtRatioZero) {
  for (const std::string& method : kFamily) testing::expect_identity_at_zero(method);
}
TEST(Merging, BytesReallyFall) {
  for (const std::string& method : kFamily) testing::expect_bytes_saved(method, .5);
}
TEST(Merging, ExportsTheSameFunction) {
  for (const char* method : {"m-smoe", "hc-smoe"}) testing::expect_export_is_the_same(method, .5);
}
TEST(Merging, DemoLoss) {
  for (const std::string& method : kFamily) testing::expect_useful_on_demo(method);
}

TEST(Merging, NeedsAreNamed) {
  const CompressionGround& ground = CompressionGround::golden();
  CompressJob job{.model = ground.model, .output = "unused", .method = "hc-smoe"};
  job.options.budget = {BudgetKind::kExperts, .5};
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"hc-smoe needs mean outputs", "--all-outputs"},
                                  [&] { estimate_compression(job); }));
  job.method = "mergemoe";
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"mergemoe needs a sample of inputs", "--sample-inputs"},
                                  [&] { estimate_compression(job); }));
}

// --refit is for every merge: only the down matrices of merged experts change, and methods that do not merge refuse it.
TEST(Merging, RefitIsAnOptionOfEveryMerge) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  for (const char* method : {"m-smoe", "hc-smoe", "sub-moe", "uncurl", "ream", "diversify"}) {
    SCOPED_TRACE(method);
    const CompressionRecord plain = ground.compress(method, .5, where / "plain");
    ground.compress(method, .5, where / "refit", [](MethodOptions& o) { o.refit = true; });
    const Checkpoint a(where / "plain"), b(where / "refit");
    ASSERT_EQ(a.names(), b.names());
    std::set<std::string> differ, merged;
    for (const std::string& name : a.names()) {
      if (!testing::bits_equal(a.file_of(name).read(name), b.file_of(name).read(name))) differ.insert(name);
    }
    for (size_t l = 0; l < plain.plan.layers.size(); ++l) {
      for (size_t j = 0; j < plain.plan.layers[l].bank.size(); ++j) {
        if (plain.plan.layers[l].bank[j].experts.size() < 2) continue;
        merged.insert(bank_tensor_name(static_cast<int64_t>(l), static_cast<int64_t>(j), ExpertMatrix::kDown));
      }
    }
    EXPECT_FALSE(differ.empty());
    for (const std::string& name : differ) EXPECT_TRUE(merged.contains(name)) << name;
  }
  for (const char* twice : {"m-smoe", "hc-smoe"}) {  // the flag is the variant
    ground.compress(twice, .5, where / "flag", [](MethodOptions& o) { o.refit = true; });
    ground.compress(std::string(twice) + "-refit", .5, where / "variant");
    const Checkpoint a(where / "flag"), b(where / "variant");
    for (const std::string& name : a.names())
      EXPECT_TRUE(testing::bits_equal(a.file_of(name).read(name), b.file_of(name).read(name))) << name;
  }
  CompressJob job{.model = ground.model, .output = "unused", .method = "reap"};
  job.options.refit = true;
  EXPECT_TRUE(
      testing::fails_with(ErrorKind::kUsage, {"reap takes no --refit", "uncurl"}, [&] { estimate_compression(job); }));
  job.method = "uncurl";
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"--refit needs a sample of inputs", "--sample-inputs"},
                                  [&] { estimate_compression(job); }));
}

// Slots that share an expert share its adapter in training, so that nothing is left beside it afterwards.
TEST(Merging, RecoversAtTheSameSize) { testing::expect_recovers("hc-smoe", .5, 0); }

}  // namespace
}  // namespace lightmoe
