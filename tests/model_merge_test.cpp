// Merging and blending checkpoints: the rules on vectors worked by hand, identities on files, one-hot blends bit for bit.

#include "compress/model_merge.h"

#include <gtest/gtest.h>

#include <cmath>

#include "compress/weight_blend.h"
#include "loaders/output.h"
#include "model/olmoe.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

namespace fs = std::filesystem;
using testing::bits_equal;
using testing::fails_with;
using testing::TempDir;

OlmoeConfig small() {
  OlmoeConfig c = read_config("tests/golden/e64k8");
  c.num_layers = 1, c.num_experts = 4, c.num_experts_per_token = 2;
  return c;
}

// A random model of this seed, as a directory.
fs::path write(const TempDir& where, const std::string& name, uint64_t seed, const OlmoeConfig& config = small()) {
  OutputDirectory output(where / name, false);
  save_model(*random_model(config, DType::kF32, seed), output.path(), DType::kF32, 1 << 30);
  output.commit();
  return where / name;
}

::testing::AssertionResult same_weights(const fs::path& a, const fs::path& b) {
  const auto x = load_model(a, DType::kF32), y = load_model(b, DType::kF32);
  const auto p = x->parameters(), q = y->parameters();
  for (size_t i = 0; i < p.size(); ++i) {
    const auto same = bits_equal(p[i]->value, q[i]->value);
    if (!same) return ::testing::AssertionFailure() << p[i]->name << ": " << same.message();
  }
  return ::testing::AssertionSuccess();
}

TEST(ModelMerge, TiesByHand) {
  // Trim to 1/2 of four: sizes 4 and 3 stay in a, 5 and 2 in b.
  std::vector<double> a{4, -1, 3, 0.5}, b{-5, 1, 2, -1.5};
  keep_largest(a, 0.5), keep_largest(b, 0.5);
  EXPECT_EQ(a, (std::vector<double>{4, 0, 3, 0}));
  EXPECT_EQ(b, (std::vector<double>{-5, 0, 2, 0}));
  // Signs of the sums: 4-5 < 0, 0, 3+2 > 0, 0. Means of those that agree: -5, none, (3+2)/2, none.
  EXPECT_EQ(elect_and_mean({{a, b}, {1, 1}}), (std::vector<double>{-5, 0, 2.5, 0}));
  // Weights 2 and 1: 8-5 > 0, so a's 4; (2*3+2)/3.
  EXPECT_EQ(elect_and_mean({{a, b}, {2, 1}}), (std::vector<double>{4, 0, 8.0 / 3, 0}));
  std::vector<double> equal{1, -1, 1};
  keep_largest(equal, 0.34);  // ceil(1.02) = 2; ties keep the lower index
  EXPECT_EQ(equal, (std::vector<double>{1, -1, 0}));
}

TEST(ModelMerge, DareKeepsTheMeanAndIsAFunctionOfTheSeed) {
  std::vector<double> a(40000, 1.0), b = a, c = a;
  drop_at_random(a, 0.25, 7, 3), drop_at_random(b, 0.25, 7, 3), drop_at_random(c, 0.25, 8, 3);
  EXPECT_EQ(a, b);
  EXPECT_NE(a, c);
  double sum = 0;
  for (const double v : a) {
    ASSERT_TRUE(v == 0 || v == 4);
    sum += v;
  }
  // Variance of one entry 1/p - 1 = 3: the mean of 40000 is 1 within six times sqrt(3 / 40000) = 0.052.
  EXPECT_NEAR(sum / 40000, 1, 0.052);
}

TEST(ModelMerge, IdentitiesOnFiles) {
  const TempDir where;
  const fs::path base = write(where, "base", 1), a = write(where, "a", 2), b = write(where, "b", 3);
  const auto merged = [&](const std::string& name, ModelMergeJob job) {
    job.output = where / name;
    merge_models(job);
    return job.output;
  };
  EXPECT_TRUE(same_weights(merged("one", {.models = {a, b}, .weights = {1, 0}}), a));
  EXPECT_TRUE(
      same_weights(merged("task", {.models = {a, b}, .base = base, .rule = MergeRule::kTask, .weights = {0, 1}}), b));
  EXPECT_TRUE(
      same_weights(merged("none", {.models = {a, b}, .base = base, .rule = MergeRule::kTask, .scale = 0}), base));
  // With everything kept and one model, TIES and DARE are that model.
  EXPECT_TRUE(same_weights(merged("ties", {.models = {a}, .base = base, .rule = MergeRule::kTies, .density = 1}), a));
  EXPECT_TRUE(same_weights(merged("dare", {.models = {a}, .base = base, .rule = MergeRule::kDare, .density = 1}), a));
  const auto mean = load_model(merged("mean", {.models = {a, b}}), DType::kF32);
  const auto x = load_model(a, DType::kF32), y = load_model(b, DType::kF32);
  for (size_t i = 0; i < mean->parameters().size(); ++i) {
    const auto p = x->parameters()[i]->value, q = y->parameters()[i]->value, m = mean->parameters()[i]->value;
    for (int64_t j = 0; j < m.numel(); ++j)
      ASSERT_EQ(m.data<float>()[j], static_cast<float>((double{p.data<float>()[j]} + q.data<float>()[j]) / 2));
  }
  EXPECT_FALSE(same_weights(a, b));
}

TEST(ModelMerge, RefusesWhatDoesNotFit) {
  const TempDir where;
  OlmoeConfig wide = small();
  wide.intermediate_size *= 2;
  const fs::path a = write(where, "a", 1), w = write(where, "w", 1, wide);
  const auto merge = [&](ModelMergeJob job) {
    job.output = where / "out";
    return [job] { merge_models(job); };
  };
  EXPECT_TRUE(
      fails_with(ErrorKind::kInput, {"w: tensor", "gate_proj", "in the other models"}, merge({.models = {a, w}})));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--base"}, merge({.models = {a}, .rule = MergeRule::kTies})));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--weights: 1 numbers for 2"}, merge({.models = {a, a}, .weights = {1}})));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--density"},
                         merge({.models = {a}, .base = a, .rule = MergeRule::kTies, .density = 0})));
  ModelMergeJob in_place{.models = {a}, .output = a, .force = true};
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {}, [&] { merge_models(in_place); }));
  EXPECT_FALSE(fs::exists(where / "out"));
}

TEST(WeightBlend, OneHotIsTheFineTuneBitForBit) {
  const TempDir where;
  const fs::path base = write(where, "base", 1), a = write(where, "a", 2), b = write(where, "b", 3);
  WeightBlend blend(base, {a, b});
  const auto is = [&](const fs::path& directory) {
    const auto expected = load_model(directory, DType::kF32);
    const auto p = blend.model().parameters(), q = expected->parameters();
    for (size_t i = 0; i < p.size(); ++i) {
      if (!bits_equal(p[i]->value, q[i]->value)) return false;
    }
    return true;
  };
  EXPECT_TRUE(is(base));
  blend.set({1, 0});
  EXPECT_TRUE(is(a));
  blend.set({0, 1});
  EXPECT_TRUE(is(b));
  blend.set({.5, .5});
  EXPECT_FALSE(is(a) || is(b));
  blend.set({0, 0});
  EXPECT_TRUE(is(base));
  const std::vector<double> w = blend.weights_for({1, 2, 3, 4, 5}, .1);
  EXPECT_NEAR(w[0] + w[1], 1, 1e-12);
  EXPECT_NE(w[0], w[1]);
  EXPECT_EQ(blend.weights_for({1}, .1), (std::vector<double>{.5, .5}));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"1 weights for 2"}, [&] { blend.set({1}); }));
}

}  // namespace
}  // namespace lightmoe
