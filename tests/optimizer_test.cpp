// AdamW over parameters: what moves, what does not, and what it costs. The update's oracle is the equation in double.

#include "autograd/optimizer.h"

#include <cmath>

#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::random_tensor;
using testing::to_doubles;

ParameterPtr parameter(const std::string& name, const Shape& shape, uint64_t seed, DType dtype = DType::kF32) {
  auto p = std::make_shared<Parameter>();
  p->name = name;
  p->value = random_tensor(shape, dtype, seed);
  return p;
}

struct Oracle {
  std::vector<double> w, m, v;
  explicit Oracle(const Tensor& value) : w(to_doubles(value)), m(w.size()), v(w.size()) {}
  void step(const std::vector<double>& g, double lr, double decay, double scale, int t) {
    for (size_t i = 0; i < w.size(); ++i) {
      const double gi = scale * g[i];
      w[i] *= 1 - lr * decay;
      m[i] = 0.9 * m[i] + 0.1 * gi;
      v[i] = 0.95 * v[i] + 0.05 * gi * gi;
      w[i] -= lr * (m[i] / (1 - std::pow(0.9, t))) / (std::sqrt(v[i] / (1 - std::pow(0.95, t))) + 1e-8);
    }
  }
};

TEST(Optimizer, FollowsTheEquationWithGroupsAndClipping) {
  const std::vector<ParameterPtr> all = {parameter("matrix", {7, 31}, 1, DType::kF64),
                                         parameter("norm", {33}, 2, DType::kF64)};
  Optimizer optimizer(all, {.weight_decay = 0.1, .clip_norm = 2, .rule = no_decay_for_vectors});
  Oracle matrix(all[0]->value), norm(all[1]->value);
  for (int t = 1; t <= 4; ++t) {
    optimizer.zero_grad();
    double squares = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const Tensor g = random_tensor(all[i]->value.shape(), DType::kF64, 10 * t + i, t == 3 ? 1e-3 : 1.0);
      all[i]->ensure_grad().copy_from(g);
      for (const double x : to_doubles(g)) squares += x * x;
    }
    const double expected_norm = std::sqrt(squares), scale = expected_norm > 2 ? 2 / expected_norm : 1;
    EXPECT_NEAR(optimizer.gradient_norm(), expected_norm, 1e-12 * expected_norm);
    const double lr = 1e-2 / t;
    matrix.step(to_doubles(all[0]->grad), lr, 0.1, scale, t);
    norm.step(to_doubles(all[1]->grad), lr, 0, scale, t);
    optimizer.step(lr, optimizer.gradient_norm());
    // Double arithmetic on both sides, a dozen operations a step.
    EXPECT_TRUE(testing::close(all[0]->value, matrix.w, 1e-13));
    EXPECT_TRUE(testing::close(all[1]->value, norm.w, 1e-13));
  }
  EXPECT_EQ(optimizer.updates(), 4);
}

TEST(Optimizer, LearningRateScaleOfAGroup) {
  const std::vector<ParameterPtr> all = {parameter("fast", {5}, 1), parameter("still", {5}, 2)};
  Optimizer optimizer(
      all, {.rule = [](const Parameter& p) { return ParameterRule{.lr_scale = p.name == "still" ? 0.0 : 1.0}; }});
  const Tensor before = all[1]->value.clone();
  for (const ParameterPtr& p : all) p->ensure_grad().copy_from(random_tensor({5}, DType::kF32, 3));
  optimizer.step(0.1, 1);
  EXPECT_TRUE(testing::bits_equal(all[1]->value, before));
}

TEST(Optimizer, FrozenParametersNeitherMoveNorCost) {
  const std::vector<ParameterPtr> all = {parameter("trained", {64, 8}, 1), parameter("frozen", {1000, 8}, 2)};
  all[1]->trainable = false;
  const Tensor before = all[1]->value.clone();
  const int64_t gradients = memory_use(MemoryCategory::kGradients).live_bytes;
  const int64_t moments = memory_use(MemoryCategory::kOptimizer).live_bytes;
  Optimizer optimizer(all, {});
  EXPECT_EQ(memory_use(MemoryCategory::kOptimizer).live_bytes, moments);  // lazily
  all[0]->ensure_grad().copy_from(random_tensor({64, 8}, DType::kF32, 3));
  optimizer.step(1e-3, optimizer.gradient_norm());
  optimizer.zero_grad();
  EXPECT_TRUE(testing::bits_equal(all[1]->value, before));
  EXPECT_EQ(memory_use(MemoryCategory::kGradients).live_bytes - gradients, 64 * 8 * 4);
  EXPECT_EQ(memory_use(MemoryCategory::kOptimizer).live_bytes - moments, 64 * 8 * 8);
  const TrainingMemory memory = training_memory(all);
  EXPECT_EQ(memory.weight_bytes, (64 + 1000) * 8 * 4);
  EXPECT_EQ(memory.gradient_bytes, 64 * 8 * 4);
  EXPECT_EQ(memory.optimizer_bytes, 64 * 8 * 8);
  EXPECT_EQ(memory.trainable, 64 * 8);
}

// A constant gradient moves AdamW by lr a step. Near 1, bf16 below has steps of 2^-8: an update of 2^-11 alone is always rounded away.
TEST(Optimizer, BF16WeightsMoveByUpdatesBelowTheirRounding) {
  auto p = std::make_shared<Parameter>();
  p->name = "weight";
  p->value = Tensor::from<float>({1, 1, 1}, {3}).to(DType::kBF16);
  const int64_t before = memory_use(MemoryCategory::kOptimizer).live_bytes;
  Optimizer optimizer({p}, {.weight_decay = 0, .clip_norm = 0});
  p->ensure_grad().copy_from(Tensor::from<float>({1, -1, 1}, {3}));
  for (int t = 1; t <= 32; ++t) {
    optimizer.step(0x1p-11, 1);
    const Tensor master = optimizer.moments(*p).master;
    EXPECT_TRUE(testing::bits_equal(p->value, master.to(DType::kBF16)));
  }
  // 32 updates of 2^-11 = 2^-6; sums in f32, each rounded once.
  const std::vector<double> expected = {1 - 0x1p-6, 1 + 0x1p-6, 1 - 0x1p-6};
  EXPECT_TRUE(testing::close(optimizer.moments(*p).master, expected, 4 * 32 * testing::unit_roundoff(DType::kF32)));
  EXPECT_TRUE(testing::close(p->value, expected, testing::unit_roundoff(DType::kBF16)));
  EXPECT_EQ(memory_use(MemoryCategory::kOptimizer).live_bytes - before, 3 * 12);
  EXPECT_EQ(training_memory({p}).optimizer_bytes, 3 * 12);
}

TEST(Optimizer, AMissingGradientCountsAsZero) {
  const std::vector<ParameterPtr> all = {parameter("used", {4}, 1), parameter("unused", {4}, 2)};
  Optimizer optimizer(all, {.weight_decay = 0.5, .clip_norm = 0});
  const std::vector<double> before = to_doubles(all[1]->value);
  all[0]->ensure_grad().copy_from(random_tensor({4}, DType::kF32, 3));
  optimizer.step(0.1, optimizer.gradient_norm());
  std::vector<double> decayed = before;
  for (double& w : decayed) w *= 0.95;
  EXPECT_TRUE(testing::close(all[1]->value, decayed, 4 * testing::unit_roundoff(DType::kF32)));
}

TEST(Optimizer, StaleGradientsCountAsZero) {
  const std::vector<ParameterPtr> all = {parameter("p", {4}, 1)};
  Optimizer optimizer(all, {.weight_decay = 0});
  all[0]->ensure_grad().copy_from(random_tensor({4}, DType::kF32, 3));
  EXPECT_GT(optimizer.gradient_norm(), 0);
  optimizer.zero_grad();
  EXPECT_EQ(optimizer.gradient_norm(), 0);
}

TEST(Optimizer, NormReportsWhatIsNotFinite) {
  const std::vector<ParameterPtr> all = {parameter("p", {33}, 1)};
  Optimizer optimizer(all, {});
  all[0]->ensure_grad().data<float>()[32] = NAN;
  EXPECT_TRUE(std::isnan(optimizer.gradient_norm()));
  all[0]->grad.data<float>()[32] = -INFINITY;
  EXPECT_TRUE(std::isinf(optimizer.gradient_norm()));
}

TEST(Optimizer, BadConstantsAreUsageErrors) {
  for (const OptimizerOptions& bad :
       {OptimizerOptions{.beta1 = 1}, OptimizerOptions{.beta2 = -0.1}, OptimizerOptions{.eps = 0},
        OptimizerOptions{.weight_decay = -1}, OptimizerOptions{.clip_norm = NAN}}) {
    EXPECT_THROW(Optimizer({}, bad), Error);
  }
}

}  // namespace
}  // namespace lightmoe
