// The small ops of extensions: values by hand or from the plain definition, gradients by central differences.

#include "autograd/extension_ops.h"

#include <gtest/gtest.h>

#include "autograd/gradcheck.h"
#include "model/slot_linear.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::close;
using testing::random_tensor;
using testing::to_doubles;

Tensor f64(const std::vector<double>& values, const Shape& shape) { return Tensor::from(values, shape); }
Var random_variable(const Shape& shape, uint64_t seed) {
  return Tape::variable(random_tensor(shape, DType::kF64, seed));
}
ParameterPtr random_parameter(const Shape& shape, uint64_t seed) {
  auto p = std::make_shared<Parameter>();
  p->name = "w";
  p->value = random_tensor(shape, DType::kF64, seed);
  return p;
}

// Central differences with steps of 1e-5 are good to about 1e-9 of values of order one.
void expect_gradients(const std::function<Var(Tape&)>& f, const std::vector<Var>& inputs,
                      const std::vector<ParameterPtr>& parameters = {}) {
  Tape probe(false);
  const Tensor weights = random_tensor(f(probe).value.shape(), DType::kF64, 99);
  const GradCheckReport report =
      check_gradients([&](Tape& tape) { return dot_loss(tape, f(tape), weights); }, inputs, parameters);
  EXPECT_LT(report.worst, 1e-7) << report.where;
  EXPECT_GT(report.checked, 0);
}

TEST(ExtensionOps, Activations) {
  const Var x = Tape::constant(f64({-1, 0, 2}, {1, 3}));
  Tape tape(false);
  // GELU by erf: Phi(1) = 0.8413447460685429, Phi(2) = 0.9772498680518208.
  EXPECT_TRUE(
      close(activate(tape, x, Activation::kGelu).value, {-(1 - .8413447460685429), 0, 2 * .9772498680518208}, 1e-14));
  EXPECT_TRUE(close(activate(tape, x, Activation::kTanh).value, {-std::tanh(1.), 0, std::tanh(2.)}, 1e-15));
  EXPECT_TRUE(close(activate(tape, x, Activation::kSigmoid).value,
                    {1 / (1 + std::exp(1.)), .5, 1 / (1 + std::exp(-2.))}, 1e-15));
  for (const Activation kind : {Activation::kGelu, Activation::kTanh, Activation::kSigmoid}) {
    const Var in = random_variable({3, 5}, 1);
    expect_gradients([&](Tape& t) { return activate(t, in, kind); }, {in});
  }
}

TEST(ExtensionOps, SoftmaxOfTheLargest) {
  const Var z = Tape::constant(f64({1, 3, 2, 3, 3, 0, 0, 0, 0, 1}, {2, 5}));
  f64(std::vector<double>(10, 1e9), {2, 5});  // memory that the result may get
  Tape tape(false);
  const double a = 1 / (1 + std::exp(-2.)), b = std::exp(1.), sum = b + 1;
  EXPECT_TRUE(
      close(softmax_top(tape, z, 2).value, {0, .5, 0, .5, 0, 1 / sum, 0, 0, 0, b / sum}, 1e-15));  // ties: the lower
  EXPECT_TRUE(close(softmax_top(tape, Tape::constant(f64({0, 1}, {1, 2})), 2, 2).value, {1 - a, a}, 1e-15));
  for (const int64_t k : {1, 3, 5}) {
    const Var in = random_variable({4, 5}, 2);
    expect_gradients([&](Tape& t) { return softmax_top(t, in, k, .7); }, {in});
  }
}

TEST(ExtensionOps, ProductsAndColumns) {
  const Var a = random_variable({3, 4}, 1), b = random_variable({3, 4}, 2), s = random_variable({1}, 3);
  expect_gradients([&](Tape& t) { return multiply(t, a, b); }, {a, b});
  expect_gradients([&](Tape& t) { return multiply(t, a, a); }, {a});
  expect_gradients([&](Tape& t) { return multiply_scalar(t, a, s); }, {a, s});
  expect_gradients([&](Tape& t) { return add_in_place(t, columns(t, a, 0, 2), columns(t, a, 1, 2)); }, {a});
  expect_gradients([&](Tape& t) { return reshaped(t, columns(t, a, 1, 3), {9, 1}); }, {a});
  const Var positive = Tape::variable(f64({1, 3, .5, .5, 2, 2}, {3, 2}));
  Tape tape(false);
  EXPECT_TRUE(close(normalised_rows(tape, positive).value, {.25, .75, .5, .5, .5, .5}, 1e-15));
  EXPECT_TRUE(close(normalised_rows(tape, Tape::constant(f64({0, 0}, {1, 2}))).value, {0, 0}, 0));
  expect_gradients([&](Tape& t) { return normalised_rows(t, positive); }, {positive});
  const ParameterPtr p = random_parameter({3, 4}, 5);
  expect_gradients([&](Tape& t) { return multiply(t, a, parameter_value(t, p, DType::kF64)); }, {a}, {p});
}

TEST(ExtensionOps, Blocks) {
  Tape tape(false);
  const Var x = Tape::constant(f64({1, 2, 3, 4}, {1, 4}));  // blocks [1 2], [3 4]
  EXPECT_TRUE(close(scale_blocks(tape, x, Tape::constant(f64({10, 1}, {1, 2}))).value, {10, 20, 3, 4}, 0));
  // Two mixtures: 10 [1 2] + 1 [3 4] and 0 [1 2] + 2 [3 4].
  EXPECT_TRUE(close(mix_blocks(tape, x, Tape::constant(f64({10, 1, 0, 2}, {1, 4})), 2).value, {13, 24, 6, 8}, 0));
  EXPECT_TRUE(
      close(add_tiled(tape, Tape::constant(f64({1, 2}, {1, 2})), Tape::constant(f64({0, 10, 20, 30}, {2, 2}))).value,
            {1, 12, 21, 32}, 0));
  ParameterPtr w = std::make_shared<Parameter>();  // block 0: one row (1 1), block 1: one row (1 -1)
  w->value = f64({1, 1, 1, -1}, {2, 2}), w->trainable = false;
  EXPECT_TRUE(close(block_linear(tape, x, w, 2, GemmCompute::kF32).value, {3, -1}, 1e-15));
  const Var in = random_variable({3, 6}, 1), scales = random_variable({3, 2}, 2), mixes = random_variable({3, 8}, 3),
            tiles = random_variable({2, 6}, 4);
  expect_gradients([&](Tape& t) { return scale_blocks(t, in, scales); }, {in, scales});
  expect_gradients([&](Tape& t) { return mix_blocks(t, in, mixes, 2); }, {in, mixes});
  expect_gradients([&](Tape& t) { return add_tiled(t, in, tiles); }, {in, tiles});
  const ParameterPtr weights = random_parameter({2 * 5, 3}, 5);
  expect_gradients([&](Tape& t) { return block_linear(t, in, weights, 2, GemmCompute::kF32); }, {in}, {weights});
}

// Used twice in one pass: gradients add up.
TEST(ExtensionOps, BlocksUsedTwice) {
  const Var in = random_variable({3, 6}, 1);
  const ParameterPtr w = random_parameter({2 * 5, 3}, 5);
  const auto blocks = [&](Tape& t) { return block_linear(t, in, w, 2, GemmCompute::kF32); };
  expect_gradients([&](Tape& t) { return add_in_place(t, blocks(t), blocks(t)); }, {in}, {w});
}

TEST(ExtensionOps, LinearMapsOfSlots) {
  const Tensor slots = Tensor::from<int32_t>({1, 0, 2, 1}, {2, 2});  // 2: skipped
  const Var x = Tape::constant(f64({1, 2, 3, 4}, {2, 2}));
  const auto w = std::make_shared<Parameter>(), b = std::make_shared<Parameter>();
  w->value = f64({1, 1, 1, -1}, {2, 2}), b->value = f64({10, 20}, {2}), w->trainable = b->trainable = false;
  Tape tape(false);
  EXPECT_TRUE(close(slot_linear(tape, x, slots, w, nullptr, 2).value, {-1, 3, 0, -1}, 1e-15));
  EXPECT_TRUE(close(slot_linear(tape, x, slots, w, b, 2).value, {19, 13, 0, 19}, 1e-15));
  const Var in = random_variable({2, 4}, 1);
  const ParameterPtr weights = random_parameter({2 * 3, 4}, 2), bias = random_parameter({2 * 3}, 3);
  const auto maps = [&](Tape& t) { return slot_linear(t, in, slots, weights, bias, 2); };
  expect_gradients([&](Tape& t) { return add_in_place(t, maps(t), maps(t)); }, {in}, {weights, bias});
}

TEST(ExtensionOps, RowsOfATable) {
  Tape tape(false);
  const Tensor memory = f64({1, 2, 3, 4, 5, 6, 1e9, 1e9}, {4, 2});  // of which three rows are the table
  const Var table = Tape::constant(memory.slice(0, 3));
  const Tensor index = Tensor::from<int32_t>({2, 0, 3, 1}, {2, 2});  // 3 is outside
  EXPECT_TRUE(close(mix_rows(tape, table, index, Tape::constant(f64({1, 10, 7, 1}, {2, 2}))).value, {15, 26, 3, 4}, 0));
  const Var rows = random_variable({3, 4}, 1), w = random_variable({2, 2}, 2);
  expect_gradients([&](Tape& t) { return mix_rows(t, rows, index, w); }, {rows, w});
}

// Two tensors of two tokens with two choices each; the second token is padding.
TEST(ExtensionOps, OpennessIsAMeanOfMeans) {
  const Var a = Tape::variable(f64({.1, .3, .5, .7, 9, 9, 9, 9}, {4, 2})),
            b = Tape::variable(f64({1, 0, 0, 0, 9, 9, 9, 9}, {4, 2}));
  const Tensor mask = Tensor::from<uint8_t>({1, 0}, {2});
  const auto loss = [&](Tape& t) { return openness_loss(t, {a, b}, mask, 1).value(); };
  Tape tape(false);
  EXPECT_NEAR(loss(tape), (.4 + .25) / 2, 1e-15);
  const GradCheckReport report = check_gradients(loss, {a, b}, {});
  EXPECT_LT(report.worst, 1e-7) << report.where;
  EXPECT_NEAR(openness_loss(tape, {b}, {}, 1).value(), 37. / 8, 1e-15);
}

}  // namespace
}  // namespace lightmoe
