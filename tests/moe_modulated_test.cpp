// Experts whose insides change from token to token, against the plain definition in double, and as plain experts where nothing changes.

#include "model/moe_modulated.h"

#include <gtest/gtest.h>

#include <cmath>

#include "autograd/gradcheck.h"
#include "model/moe_op.h"
#include "model/unit_blocks.h"
#include "tests/support/moe_layers.h"

namespace lightmoe {
namespace {

using testing::close;
using testing::random_tensor;
using testing::to_doubles;

// Slot 3 is removed; expert 4 gets no token; slot 0 gets most.
const testing::LayerSpec kSpec{.hidden = 7, .width = 6, .expert_of_slot = {2, 0, 1, -1, 3, 4}};
constexpr int64_t kTokens = 5, kTopK = 2;

struct Case {
  MoeLayer layer = testing::make_layer(kSpec, DType::kF64, DType::kF64, 3);
  Tensor slots =
      Tensor::from<int32_t>({0, 1, 2, 0, 4, 0, 6, 0, 0, 2}, {kTokens, kTopK});  // 6 = E: a choice that was skipped
  Var x_gate = Tape::variable(random_tensor({kTokens, 7}, DType::kF64, 1)),
      x_up = Tape::variable(random_tensor({kTokens, 7}, DType::kF64, 2)),
      gates = Tape::variable(random_tensor({kTokens, kTopK}, DType::kF64, 4));
  std::vector<ParameterPtr> parameters() const {
    std::vector<ParameterPtr> all;
    for (const Expert& e : layer.experts) all.insert(all.end(), {e.gate_up, e.down});
    return all;
  }
  ModulatedExperts in(const Var& scale) const {
    return {.x_gate = x_gate, .x_up = x_up, .slots = slots, .gates = gates, .scale = scale};
  }
};

std::vector<double> plainly(const Case& c, const Var& scale, int64_t units) {
  std::vector<double> y(kTokens * 7, 0.0);
  for (int64_t i = 0; i < kTokens * kTopK; ++i) {
    const int32_t slot = c.slots.data<int32_t>()[i];
    if (slot == 6) continue;
    const Expert& e = c.layer.experts[static_cast<size_t>(c.layer.slots[static_cast<size_t>(slot)].expert)];
    const int64_t t = i / kTopK;
    for (int64_t j = 0; j < 6; ++j) {
      double gate = 0, up = 0;
      for (int64_t d = 0; d < 7; ++d) {
        gate += e.gate_up->value.data<double>()[j * 7 + d] * c.x_gate.value.data<double>()[t * 7 + d];
        up += e.gate_up->value.data<double>()[(6 + j) * 7 + d] * c.x_up.value.data<double>()[t * 7 + d];
      }
      double a = gate / (1 + std::exp(-gate)) * up;
      if (scale.value.defined()) {
        const int64_t row = scale.value.dim(0) == kTokens ? t : i;
        a *= scale.value.data<double>()[row * scale.value.dim(1) + j / units];
      }
      for (int64_t d = 0; d < 7; ++d)
        y[static_cast<size_t>(t * 7 + d)] +=
            c.gates.value.data<double>()[i] * e.down->value.data<double>()[d * 6 + j] * a;
    }
  }
  return y;
}

TEST(ModulatedExperts, AreTheirDefinition) {
  const Case c;
  Tape tape(false);
  const Var none, by_token = Tape::variable(random_tensor({kTokens, 6}, DType::kF64, 5)),
                  by_choice = Tape::variable(random_tensor({kTokens * kTopK, 3}, DType::kF64, 6));
  // Sums of a few dozen products in double.
  EXPECT_TRUE(close(modulated_experts(tape, c.in(none), c.layer, GemmCompute::kF32).value, plainly(c, none, 1), 1e-13));
  EXPECT_TRUE(
      close(modulated_experts(tape, c.in(by_token), c.layer, GemmCompute::kF32).value, plainly(c, by_token, 1), 1e-13));
  EXPECT_TRUE(close(modulated_experts(tape, c.in(by_choice), c.layer, GemmCompute::kF32).value,
                    plainly(c, by_choice, 2), 1e-13));
}

TEST(ModulatedExperts, Gradients) {
  const Case c;
  const Tensor weights = random_tensor({kTokens, 7}, DType::kF64, 9);
  for (const Shape& shape : {Shape{kTokens, 6}, Shape{kTokens * kTopK, 2}}) {
    const Var scale = Tape::variable(random_tensor(shape, DType::kF64, 7));
    const GradCheckReport report = check_gradients(
        [&](Tape& tape) {
          return dot_loss(tape, modulated_experts(tape, c.in(scale), c.layer, GemmCompute::kF32), weights);
        },
        {c.x_gate, c.x_up, c.gates, scale}, c.parameters());
    EXPECT_LT(report.worst, 1e-7) << report.where;
    EXPECT_GT(report.checked, 100);
  }
}

TEST(ModulatedExperts, AreTheExpertsWhereNothingChanges) {
  const Case c;
  Tape tape(false);
  const Tensor plain = moe_experts(tape, c.x_gate, c.layer, c.slots, c.gates, GemmCompute::kF32).value;
  ModulatedExperts in = c.in({});
  in.x_up = c.x_gate;
  EXPECT_TRUE(close(modulated_experts(tape, in, c.layer, GemmCompute::kF32).value, to_doubles(plain), 1e-14));
}

TEST(UnitBlocks, ContributionsAndTheirLargest) {
  const Case c;
  const Tensor a = unit_activations(c.layer, c.x_gate.value, c.slots, GemmCompute::kF32);
  ASSERT_EQ(a.shape(), (Shape{kTokens * kTopK, 6}));
  const Tensor b = block_contributions(c.layer, a, c.slots, 3);
  // Choice 2: token 1, slot 2, expert 1.
  const Tensor& down = c.layer.experts[1].down->value;
  for (int64_t block = 0; block < 3; ++block) {
    double expected = 0;
    for (int64_t j = 2 * block; j < 2 * block + 2; ++j) {
      double length = 0;
      for (int64_t d = 0; d < 7; ++d) length += std::pow(down.data<double>()[d * 6 + j], 2);
      expected += std::abs(a.data<double>()[2 * 6 + j]) * std::sqrt(length);
    }
    EXPECT_NEAR(b.data<double>()[2 * 3 + block], expected, 1e-13);
    EXPECT_EQ(b.data<double>()[6 * 3 + block], 0);  // choice 6 was skipped
  }
  EXPECT_TRUE(
      close(keep_largest(Tensor::from<double>({1, 3, 2, 3, 0, 0, 0, 0}, {2, 4}), 2), {0, 1, 0, 1, 1, 1, 0, 0}, 0));
}

}  // namespace
}  // namespace lightmoe
