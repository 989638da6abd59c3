// Extensions that run the chosen experts otherwise: Compressed Experts, and blocks of units (MoEfication, DSMoE).

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "model/moe_modulated.h"
#include "tests/support/extensions.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

using namespace testing::extensions;
using testing::close;
using testing::fails_with;
using testing::random_tensor;
using testing::to_doubles;

// --- Compressed Experts -----------------------------------------------------------------------------------------

TEST(CompressedExperts, AtOnesIsPlainRoutingToFewer) {
  const Batch batch = some_batch();
  for (const int64_t auxiliary : {1, 2}) {
    const auto model = extended(fmt::format("compressed-experts:auxiliary={}", auxiliary), DType::kF64, true);
    const RoutingOptions fewer{.top_k = kTopK - auxiliary};
    const Tensor expected = random_model(tiny_config(), DType::kF64, 3)->forward(batch, {.routing = &fewer});
    EXPECT_TRUE(close(model->forward(batch, {}), to_doubles(expected), 1e-13));
  }
}

// Token by token: the auxiliaries' vectors, weighted by their gates, inside the main experts.
TEST(CompressedExperts, IsItsDefinition) {
  const BlockCase c("compressed-experts:auxiliary=2");
  const double* table = tensors_of(*c.layer().extension).at("ces").data<double>();
  Vector expected(kTokens * kHidden, 0.0);
  for (int64_t t = 0; t < kTokens; ++t) {
    const int32_t* slots = c.slots.data<int32_t>() + t * kTopK;
    const double *g = c.gates.value.data<double>() + t * kTopK, *x = c.x.value.data<double>() + t * kHidden;
    Vector e(3 * kHidden, 0.0);
    for (int k = 1; k < 3; ++k) {
      for (int64_t j = 0; j < 3 * kHidden; ++j)
        e[static_cast<size_t>(j)] += g[k] / (g[1] + g[2]) * table[slots[k] * 3 * kHidden + j];
    }
    const Expert& expert = c.layer().experts[static_cast<size_t>(slots[0])];
    Vector in_gate(kHidden), in_up(kHidden);
    for (size_t d = 0; d < kHidden; ++d) in_gate[d] = x[d] * e[d], in_up[d] = x[d] * e[2 * kHidden + d];
    const Vector gate = times(expert.gate_up->value, in_gate, 0, kWidth),
                 up = times(expert.gate_up->value, in_up, kWidth, kWidth);
    Vector a(kWidth);
    for (size_t j = 0; j < kWidth; ++j) a[j] = gate[j] / (1 + std::exp(-gate[j])) * up[j] * e[kHidden + j];
    const Vector y = times(expert.down->value, a);
    for (size_t d = 0; d < kHidden; ++d) expected[static_cast<size_t>(t * kHidden) + d] = g[0] * y[d];
  }
  Tape tape(false);
  EXPECT_TRUE(close(c.run(tape).y.value, expected, 1e-13));
}

TEST(CompressedExperts, TakesOnesWhereTheAuxiliariesWereSkipped) {
  BlockCase c("compressed-experts:auxiliary=1");
  for (int64_t t = 0; t < kTokens; ++t) {
    c.slots.data<int32_t>()[t * kTopK + 2] = kSlots;
    c.gates.value.data<double>()[t * kTopK + 2] = 0;
  }
  Tape tape(false);
  EXPECT_TRUE(close(c.run(tape).y.value, to_doubles(c.experts()), 1e-13));
}

// --- blocks of units --------------------------------------------------------------------------------------------

TEST(Moefication, AllBlocksAreTheModelAndFewerAreFewer) {
  const BlockCase c("moefication:blocks=5");
  const Vector plain = to_doubles(c.experts());
  Tape tape(false);
  EXPECT_TRUE(close(c.run(tape).y.value, plain, 0));  // the default
  Vector of_selector;
  for (const bool oracle : {false, true}) {
    Vector errors;
    for (const int64_t blocks : {5, 4, 2, 1}) {
      RoutingCounts counts;
      const RoutingOptions routing{.unit_blocks = blocks, .unit_oracle = oracle, .counts = &counts};
      const Tensor y = c.run(tape, &routing).y.value;
      double error = 0;
      for (size_t i = 0; i < plain.size(); ++i) error += std::pow(to_doubles(y)[i] - plain[i], 2);
      errors.push_back(std::sqrt(error));
      EXPECT_EQ(counts.blocks, kTokens * kTopK * 5);
      EXPECT_EQ(counts.blocks_run, kTokens * kTopK * blocks);
    }
    EXPECT_LT(errors[0], 1e-13);  // split and use all: exact but for rounding
    EXPECT_GT(errors[1], 1e-3);
    if (!oracle) of_selector = errors;
    for (size_t i = 1; oracle && i < errors.size(); ++i) EXPECT_LT(errors[i], .8 * of_selector[i]);  // it knows nothing
    if (!oracle) continue;
    EXPECT_LT(errors[1], .5 * errors[3]);
  }
  const RoutingOptions too_many{.unit_blocks = 6};
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--unit-blocks 6", "1 to 5"}, [&] { c.run(tape, &too_many); }));
}

// The selector by hand: W2 tanh(W1 x) of the choice's own slot decides which blocks' units are there.
TEST(Moefication, TheSelectorPicks) {
  const BlockCase c("moefication:blocks=5");
  const Tensors t = tensors_of(*c.layer().extension);
  Vector expected(kTokens * kHidden, 0.0);
  for (int64_t i = 0; i < kTokens * kTopK; ++i) {
    const int64_t token = i / kTopK, slot = c.slots.data<int32_t>()[i];
    const double* x = c.x.value.data<double>() + token * kHidden;
    const Vector in(x, x + kHidden);
    const Vector scores =
        times(t.at("select_out"), mapped(times(t.at("select_in"), in, 5 * slot, 5), std::tanh), 5 * slot, 5);
    const Vector kept = softmax_of_largest(scores, 2);  // not 0 at the two largest
    const Expert& expert = c.layer().experts[static_cast<size_t>(slot)];
    const Vector h = times(expert.gate_up->value, in);
    Vector a(kWidth);
    for (size_t j = 0; j < kWidth; ++j) a[j] = kept[j / 2] > 0 ? h[j] / (1 + std::exp(-h[j])) * h[kWidth + j] : 0;
    const Vector y = times(expert.down->value, a);
    for (size_t d = 0; d < kHidden; ++d)
      expected[static_cast<size_t>(token * kHidden) + d] += c.gates.value.data<double>()[i] * y[d];
  }
  const RoutingOptions routing{.unit_blocks = 2};
  Tape tape(false);
  EXPECT_TRUE(close(c.run(tape, &routing).y.value, expected, 1e-13));
}

TEST(Dsmoe, StartsOpenAsTheModel) {
  const Batch batch = some_batch();
  const Tensor plain = random_model(tiny_config(), DType::kF64, 3)->forward(batch, {});
  RoutingCounts counts;
  const RoutingOptions routing{.counts = &counts};
  const auto model = extended("dsmoe:blocks=5", DType::kF64, true);
  EXPECT_TRUE(close(model->forward(batch, {.routing = &routing}), to_doubles(plain), 1e-13));
  EXPECT_EQ(counts.blocks, 2 * 18 * kTopK * 5);
  EXPECT_EQ(counts.blocks_run, counts.blocks);
}

// The gradient of a gate is that of its multiplier (by differences of the multiplied experts) times sigmoid's slope: straight through.
TEST(Dsmoe, GatesAreStraightThroughAndThresholded) {
  const BlockCase c("dsmoe:blocks=5");
  const Tensors t = tensors_of(*c.layer().extension);
  const Tensor weights = random_tensor({kTokens, kHidden}, DType::kF64, 23);
  for (const ParameterPtr& p : c.parameters()) p->zero_grad();
  Tape tape;
  const MoeResult result = c.run(tape);
  dot_loss(tape, result.y, weights);
  tape.backward();
  Vector bias(kSlots * 5, 0.0), z(kTokens * kTopK * 5), hard(z.size());
  for (int64_t i = 0; i < kTokens * kTopK; ++i) {
    const double* x = c.x.value.data<double>() + i / kTopK * kHidden;
    const int64_t slot = c.slots.data<int32_t>()[i];
    const Vector own = times(t.at("gate"), Vector(x, x + kHidden), 5 * slot, 5);
    for (int64_t b = 0; b < 5; ++b) {
      const auto at = static_cast<size_t>(i * 5 + b);
      z[at] = own[static_cast<size_t>(b)] + t.at("bias").data<double>()[5 * slot + b];
      hard[at] = z[at] > 0 ? 1 : 0;
      EXPECT_NEAR(result.open.value.data<double>()[at], 1 / (1 + std::exp(-z[at])), 1e-14);
    }
  }
  const auto output = [&](const Vector& m) {
    Tape unrecorded(false);
    const ModulatedExperts in{.x_gate = c.x,
                              .x_up = c.x,
                              .slots = c.slots,
                              .gates = c.gates,
                              .scale = Tape::constant(Tensor::from(m, {kTokens * kTopK, 5}))};
    return modulated_experts(unrecorded, in, c.layer(), GemmCompute::kF32).value;
  };
  EXPECT_TRUE(close(result.y.value, to_doubles(output(hard)), 1e-14));
  const auto loss = [&](const Vector& m) {
    double sum = 0;
    const Vector y = to_doubles(output(m)), w = to_doubles(weights);
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * w[i];
    return sum;
  };
  for (size_t i = 0; i < z.size(); ++i) {  // linear in each multiplier: the difference is exact
    Vector above = hard;
    above[i] += 1;
    const double g = 1 / (1 + std::exp(-z[i]));
    bias[static_cast<size_t>(c.slots.data<int32_t>()[i / 5]) * 5 + i % 5] += (loss(above) - loss(hard)) * g * (1 - g);
  }
  EXPECT_TRUE(close(extension_parameter(c.layer(), "bias")->grad, bias, 1e-10));
}

// Training with the sparsity loss alone closes blocks; recomputing activations changes nothing.
TEST(Dsmoe, TheSparsityLossIsScaled) {
  std::map<double, Vector> gradients;
  for (const double micro_batches : {1., 4.}) {  // the coefficient is of a step, aux_scale shares it out
    const auto model = extended("dsmoe:blocks=5", DType::kF64);
    model->forward_backward(some_batch(),
                            {.loss_scale = .1, .aux_scale = 1 / micro_batches, .sparsity_coef = micro_batches});
    gradients[micro_batches] = to_doubles(extension_parameter(model->blocks[0].moe, "bias")->grad);
  }
  EXPECT_EQ(gradients[1], gradients[4]);
}

TEST(Dsmoe, SparsityClosesBlocksWhateverIsRecomputed) {
  std::map<Recompute, Vector> gradients;
  for (const Recompute recompute : {Recompute::kNone, Recompute::kMoe, Recompute::kBlock}) {
    const auto model = extended("dsmoe:blocks=5", DType::kF64);
    const TrainLosses losses = model->forward_backward(
        some_batch(), {.loss_scale = .1, .aux_scale = .5, .recompute = recompute, .sparsity_coef = 3});
    EXPECT_GT(losses.open, 0);
    EXPECT_LT(losses.open, 1);
    for (const ParameterPtr& p : model->parameters()) {
      const Vector g = to_doubles(p->grad);
      gradients[recompute].insert(gradients[recompute].end(), g.begin(), g.end());
    }
  }
  EXPECT_EQ(gradients[Recompute::kNone], gradients[Recompute::kMoe]);
  EXPECT_EQ(gradients[Recompute::kNone], gradients[Recompute::kBlock]);
  const auto model = extended("dsmoe:blocks=5", DType::kF64, true);
  train_extension_alone(*model);
  double first = 0, last = 0;
  for (int step = 0; step < 30; ++step) {
    for (const ParameterPtr& p : model->parameters()) p->zero_grad();
    const TrainLosses losses = model->forward_backward(some_batch(), {.loss_scale = 1e-9, .sparsity_coef = 1});
    if (step == 0) first = losses.open;
    for (const ParameterPtr& p : model->parameters()) {
      for (int64_t i = 0; p->trainable && i < p->value.numel(); ++i)
        p->value.data<double>()[i] -= 50 * p->grad.data<double>()[i];
    }
    last = losses.open;
  }
  EXPECT_LT(last, .5 * first);
  RoutingCounts counts;
  const RoutingOptions routing{.counts = &counts};
  model->forward(some_batch(), {.routing = &routing});
  EXPECT_LT(counts.blocks_run, counts.blocks / 2);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"sparsity loss", "dsmoe"}, [&] {
    random_model(tiny_config(), DType::kF64, 3)->forward_backward(some_batch(), {.sparsity_coef = 1});
  }));
}

}  // namespace
}  // namespace lightmoe
