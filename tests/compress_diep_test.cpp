// DiEP: gradients of the learned weights, what it removes.

#include "compress/diep_training.h"

#include <gtest/gtest.h>

#include "compress/expert_budget.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;
using testing::TempDir;
using Matrix = std::vector<std::vector<double>>;

std::unique_ptr<Olmoe> small_model() {
  OlmoeConfig config;
  config.vocab_size = 11, config.hidden_size = 8, config.intermediate_size = 6, config.num_layers = 2;
  config.num_heads = config.num_kv_heads = 1, config.num_experts = 4, config.num_experts_per_token = 2;
  config.initializer_range = .5;
  return random_model(config, DType::kF32, 9);
}
Batch one_sequence() {
  const std::vector<int32_t> ids = {1, 5, 2, 8, 3, 9, 10, 4, 4, 7};
  return make_batch(ids, 1, static_cast<int64_t>(ids.size()), ids);
}

TEST(Diep, GradientsAreThoseOfTheLoss) {
  const auto model = small_model();
  const Batch batch = one_sequence();
  Matrix alpha = {{.3, -.2, .1, 0}, {-.4, .2, 0, .5}};
  std::vector<double> beta = {1.1, .8};
  const double lambda = .3;
  const ImportanceGradient g = importance_gradient(*model, batch, lambda, alpha, beta);
  const auto slope = [&](double& x) {
    const double before = x, step = 1e-2;  // f32 losses: rounding of 1e-7 over the step, and an error of its square
    x = before + step;
    const double up = importance_gradient(*model, batch, lambda, alpha, beta).loss;
    x = before - step;
    const double down = importance_gradient(*model, batch, lambda, alpha, beta).loss;
    x = before;
    return (up - down) / (2 * step);
  };
  double largest = 0;
  for (size_t l = 0; l < 2; ++l) {
    EXPECT_NEAR(g.beta[l], slope(beta[l]), 2e-3) << l;
    for (size_t e = 0; e < 4; ++e) {
      EXPECT_NEAR(g.alpha[l][e], slope(alpha[l][e]), 2e-3) << l << " " << e;
      largest = std::max(largest, std::abs(g.alpha[l][e]));
    }
  }
  EXPECT_GT(largest, 2e-2);  // so that the tolerance means something
}

// An expert whose output is zero: its own weight does nothing, it only takes from the others through the softmax. With w = beta E a:
//   d/dalpha_0 = beta E a_0 (0 - sum_j a_j dw_j) = -a_0 beta (d/dbeta); and a softmax's gradients sum to zero.
TEST(Diep, AnExpertOfZerosByHand) {
  const auto model = small_model();
  for (const Block& block : model->blocks) block.moe.experts[0].down->value.fill_zero();
  const Matrix alpha = {{0, 0, 0, 0}, {std::log(2.), 0, 0, 0}};  // shares 1/4; 2/5 and 1/5
  const std::vector<double> beta = {1, 1.5};
  const ImportanceGradient g = importance_gradient(*model, one_sequence(), .01, alpha, beta);
  EXPECT_NEAR(g.alpha[0][0], -.25 * g.beta[0], 1e-7);
  EXPECT_NEAR(g.alpha[1][0], -.4 * 1.5 * g.beta[1], 1e-7);
  for (const std::vector<double>& layer : g.alpha) EXPECT_NEAR(layer[0] + layer[1] + layer[2] + layer[3], 0, 1e-7);
}

// Where the router chooses all experts with equal gates, the relaxed model starts as the model: its loss is the model's own and there is
// nothing to reconstruct.
TEST(Diep, StartsAsTheMeanOfAllExperts) {
  const auto model = small_model();
  model->config.num_experts_per_token = 4;
  for (const Block& block : model->blocks) block.moe.router->value.fill_zero();
  const Matrix alpha(2, std::vector<double>(4, 0.0));
  const ImportanceGradient g = importance_gradient(*model, one_sequence(), 1e6, alpha, {1, 1});
  for (const ParameterPtr& p : model->parameters()) EXPECT_TRUE(p->trainable);
  const TrainLosses own = model->forward_backward(one_sequence(), {});
  EXPECT_NEAR(g.loss, own.ce_sum / static_cast<double>(own.labels), 1e-6);
}

// Only labels count: with none but the last, the learned weights differ from those of every next token; with none at all there is an error.
TEST(Diep, LearnsFromTheLabels) {
  const auto model = small_model();
  Statistics sample = empty_statistics(2, 4, 8, false);
  for (int i = 0; i < 6; ++i) {
    sample.sample_ids.push_back(i + 1), sample.sample_token.push_back(i), sample.sample_sequence.push_back(i / 3);
  }
  const DiepOptions options{.epochs = 2, .batch = 1};
  const ExpertImportance every = learn_importance(*model, sample, options);
  sample.sample_labels = {2, 3, -100, 5, 6, -100};
  EXPECT_EQ(learn_importance(*model, sample, options).alpha, every.alpha);
  sample.sample_labels = {-100, 3, -100, -100, 6, -100};
  EXPECT_NE(learn_importance(*model, sample, options).alpha, every.alpha);
  sample.sample_labels.assign(6, -100);
  EXPECT_TRUE(
      testing::fails_with(ErrorKind::kInput, {"loss counts"}, [&] { learn_importance(*model, sample, options); }));
}

TEST(Diep, RemovesByLearnedScoresOverAllLayers) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const CompressionRecord record = ground.compress("diep", .4, where / "out");
  int64_t left = 0;
  for (const LayerPlan& layer : record.plan.layers) {
    EXPECT_GE(layer.bank.size(), 8u);
    left += std::ssize(layer.bank);
  }
  EXPECT_EQ(left, 128 * 6 / 10);
  // The same seed learns the same, another order of the sequences something else.
  const auto model = load_model(ground.model, DType::kF32);
  const DiepOptions options{.epochs = 8, .batch = 1};
  const ExpertImportance a = learn_importance(*model, ground.statistics, options);
  const ExpertImportance b = learn_importance(*model, ground.statistics, options);
  EXPECT_EQ(a.alpha, b.alpha);
  EXPECT_NE(a.beta, (std::vector<double>{1, 1}));
  Statistics bare = ground.statistics;
  bare.sample_ids.clear();
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"diep", "a sample of tokens"},
                                  [&] { check_needs(find_method("diep"), {}, bare); }));
}

// An expert that hurts is the first to go: the layer's most used one answers the wrong way round.
TEST(Diep, FindsTheExpertThatHurts) {
  const CompressionGround& ground = CompressionGround::demo();
  const auto model = load_model(ground.model, DType::kF32);
  const std::vector<double>& mass = ground.statistics.layers[1].gate_mass;
  const auto worst = std::max_element(mass.begin(), mass.end()) - mass.begin();
  const Tensor& down = model->blocks[1].moe.experts[static_cast<size_t>(worst)].down->value;
  for (int64_t i = 0; i < down.numel(); ++i) down.data<float>()[i] *= -6;
  const ExpertImportance learned = learn_importance(*model, ground.statistics, {.epochs = 2});
  const std::vector<double>& layer = learned.alpha[1];
  EXPECT_EQ(std::min_element(layer.begin(), layer.end()) - layer.begin(), worst);
}

TEST(Diep, IdentityBytesAndExport) {
  testing::expect_identity_at_zero("diep");
  testing::expect_bytes_saved("diep", .5);
}
TEST(Diep, Recovers) { testing::expect_recovers("diep", .5, 0); }
TEST(Diep, DemoLoss) { testing::expect_useful_on_demo("diep"); }

}  // namespace
}  // namespace lightmoe
