#include <map>

#include "kernels/router.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

struct Layers {
  std::vector<Tensor> probs, slots;
  Tensor mask;
  std::vector<int32_t> tokens;  // counted
  Layers(int64_t layers, int64_t rows, int64_t count, int64_t top_k, DType dtype, bool masked) {
    Philox random(static_cast<uint64_t>(rows * 7 + count));
    std::vector<uint8_t> keep(static_cast<size_t>(rows), 1);
    for (uint8_t& k : keep) k = masked ? random.below(3) > 0 : 1;
    for (int32_t t = 0; t < rows; ++t) {
      if (keep[static_cast<size_t>(t)]) tokens.push_back(t);
    }
    if (masked) mask = Tensor::from(keep, {rows});
    for (int64_t l = 0; l < layers; ++l) {
      probs.push_back(random_tensor({rows, count}, dtype, static_cast<uint64_t>(20 + l)));
      std::vector<int32_t> chosen;
      for (int64_t t = 0; t < rows; ++t) {
        const int64_t first = static_cast<int64_t>(random.below(static_cast<uint64_t>(count)));
        for (int64_t k = 0; k < top_k; ++k) chosen.push_back(static_cast<int32_t>((first + k) % count));
      }
      slots.push_back(Tensor::from(chosen, {rows, top_k}));
    }
  }
  double oracle() const {
    std::map<int32_t, double> chosen, probability;
    const double n = static_cast<double>(probs.size() * tokens.size());
    if (n == 0) return 0;
    const int64_t count = probs[0].dim(1), top_k = slots[0].dim(1);
    for (size_t l = 0; l < probs.size(); ++l) {
      const std::vector<double> p = to_doubles(probs[l]), s = to_doubles(slots[l]);
      for (const int32_t t : tokens) {
        for (int64_t k = 0; k < top_k; ++k) {
          chosen[static_cast<int32_t>(s[static_cast<size_t>(t * top_k + k)])] += 1 / n;
        }
        for (int64_t e = 0; e < count; ++e)
          probability[static_cast<int32_t>(e)] += p[static_cast<size_t>(t * count + e)] / n;
      }
    }
    double sum = 0;
    for (const auto& [e, fraction] : chosen) sum += fraction * probability[e];
    return static_cast<double>(count) * sum;
  }
};

double loss_of(const Layers& layers) {
  const Guarded loss({1}, DType::kF64);
  run(LoadBalance{.probs = layers.probs, .slots = layers.slots, .mask = layers.mask, .loss = loss.tensor()});
  return to_doubles(loss.tensor())[0];
}

void check_loss() {
  for (const DType dtype : testing::floating_dtypes()) {
    if (dtype == DType::kBF16) continue;
    for (const bool masked : {false, true}) {
      for (const int64_t rows : {0, 1, 31, 200, 1100}) {
        const Layers layers(3, rows, 13, 4, dtype, masked);
        EXPECT_NEAR(loss_of(layers), layers.oracle(), 1e-12 * (1 + std::abs(layers.oracle())));
      }
    }
  }
}

TEST(LoadBalance, MatchesTheEquation) { testing::on_each_device<LoadBalance>(check_loss); }

// Uniform routing: f_e = K / E and P_e = 1 / E, so the loss is K whatever E.
TEST(LoadBalance, IsTopKForUniformRouting) {
  Layers layers(2, 12, 12, 3, DType::kF64, false);
  for (size_t l = 0; l < 2; ++l) {
    for (int64_t i = 0; i < 12 * 12; ++i) layers.probs[l].data<double>()[i] = 1.0 / 12;
    for (int32_t i = 0; i < 12 * 3; ++i) layers.slots[l].data<int32_t>()[i] = i % 12;
  }
  EXPECT_NEAR(loss_of(layers), 3, 1e-14);
}

TEST(LoadBalance, GradientCheck) {
  for (const bool masked : {false, true}) {
    const Layers layers(2, 9, 5, 2, DType::kF64, masked);
    std::vector<Tensor> dprobs;
    for (int l = 0; l < 2; ++l) dprobs.push_back(Tensor::empty({9, 5}, DType::kF64));
    run(LoadBalanceBackward{
        .probs = layers.probs, .slots = layers.slots, .mask = layers.mask, .scale = 0.5, .dprobs = dprobs});
    for (size_t l = 0; l < 2; ++l) {
      EXPECT_TRUE(testing::gradient_matches([&] { return 0.5 * loss_of(layers); }, layers.probs[l], dprobs[l], 1e-9));
    }
  }
}

void check_masked_gradient() {
  const Layers layers(2, 40, 5, 2, DType::kF32, true);
  const Guarded first({40, 5}, DType::kF32);
  run(LoadBalanceBackward{
      .probs = layers.probs, .slots = layers.slots, .mask = layers.mask, .dprobs = {first.tensor(), Tensor()}});
  const std::vector<double> mask = to_doubles(layers.mask), gradient = to_doubles(first.tensor());
  for (size_t i = 0; i < 200; ++i) ASSERT_EQ(gradient[i] == 0, mask[i / 5] == 0) << i;
  layers.mask.fill_zero();
  run(LoadBalanceBackward{
      .probs = layers.probs, .slots = layers.slots, .mask = layers.mask, .dprobs = {first.tensor(), Tensor()}});
  for (const double g : to_doubles(first.tensor())) ASSERT_EQ(g, 0);
}

TEST(LoadBalance, GradientOfMaskedTokensIsZeroAndUndefinedLayersAreSkipped) {
  testing::on_each_device<LoadBalanceBackward>(check_masked_gradient);
}

TEST(LoadBalance, RefusesWrongShapes) {
  Layers layers(2, 4, 5, 2, DType::kF32, false);
  layers.slots.pop_back();
  EXPECT_THROW(loss_of(layers), Error);
}

}  // namespace
}  // namespace lightmoe
