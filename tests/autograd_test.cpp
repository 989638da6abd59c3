#include <gtest/gtest.h>

#include "autograd/gradcheck.h"
#include "autograd/ops.h"
#include "kernels/elementwise.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::bits_equal;
using testing::random_tensor;

constexpr double kTolerance = 1e-7;  // central differences with step 1e-5: truncation about 1e-10, rounding about 1e-11

ParameterPtr parameter(const Shape& shape, uint64_t seed, double stddev = 1) {
  auto p = std::make_shared<Parameter>();
  p->name = fmt::format("p{}", seed);
  p->value = random_tensor(shape, DType::kF64, seed, stddev);
  return p;
}
Var variable(const Shape& shape, uint64_t seed) { return Tape::variable(random_tensor(shape, DType::kF64, seed)); }
// Ops that write over their input get a copy that shares the gradient.
Var copy_of(const Var& x) { return {x.value.clone(), x.grad}; }

void expect_good(const std::function<double(Tape&)>& loss, const std::vector<Var>& inputs,
                 const std::vector<ParameterPtr>& parameters = {}) {
  const GradCheckReport report = check_gradients(loss, inputs, parameters);
  EXPECT_GT(report.checked, 0);
  EXPECT_LT(report.worst, kTolerance) << report.where;
}

TEST(Autograd, Embedding) {
  const ParameterPtr table = parameter({5, 7}, 1);
  const Tensor ids = Tensor::from<int32_t>({4, 0, 4, 2}, {4}), weights = random_tensor({4, 7}, DType::kF64, 2);
  expect_good([&](Tape& tape) { return dot_loss(tape, embedding(tape, ids, table), weights); }, {}, {table});
}

TEST(Autograd, RmsNorm) {
  const Var x = variable({3, 7}, 1);
  const ParameterPtr w = parameter({7}, 2);
  const Tensor weights = random_tensor({3, 7}, DType::kF64, 3);
  expect_good([&](Tape& tape) { return dot_loss(tape, rms_norm(tape, x, w, 1e-5), weights); }, {x}, {w});
}

TEST(Autograd, LinearUsedTwiceAddsItsGradients) {
  const Var x = variable({5, 3}, 1);
  const ParameterPtr w1 = parameter({4, 3}, 2), w2 = parameter({4, 3}, 3);
  const Tensor weights = random_tensor({5, 4}, DType::kF64, 4);
  const auto loss = [&](Tape& tape) {
    const Var y = linear(tape, x, w1, {}), z = linear(tape, x, w2, {});
    return dot_loss(tape, add_in_place(tape, y, z), weights) + dot_loss(tape, linear(tape, x, w1, {}), weights);
  };
  expect_good(loss, {x}, {w1, w2});
}

TEST(Autograd, ClampSwiGlu) {
  const Var x = variable({5, 8}, 1);
  const Tensor wide = random_tensor({5, 8}, DType::kF64, 2), half = random_tensor({5, 4}, DType::kF64, 3);
  expect_good([&](Tape& tape) { return dot_loss(tape, clamp(tape, x, 0.7), wide); }, {x});
  expect_good([&](Tape& tape) { return dot_loss(tape, swiglu(tape, x), half); }, {x});
}

// Queries and keys of different widths, each wanted, and each alone.
TEST(Autograd, QkNormRope) {
  const Var q = variable({5, 8}, 1), k = variable({5, 4}, 2);
  const QkNorm norm{.q = parameter({8}, 3), .k = parameter({4}, 4), .eps = 1e-5, .limit = 1.1};
  const HeadTurns turns{.positions = Tensor::from<int32_t>({0, 1, 2, 100, 3}, {5}), .head_dim = 4};
  const Tensor wide = random_tensor({5, 8}, DType::kF64, 5), half = random_tensor({5, 4}, DType::kF64, 6);
  for (const int wanted : {1, 2, 3}) {
    const auto loss = [&](Tape& tape) {
      const QueriesKeys y = qk_norm_rope(tape, {copy_of(q), copy_of(k)}, norm, turns);
      return (wanted & 1 ? dot_loss(tape, y.q, wide) : 0) + (wanted & 2 ? dot_loss(tape, y.k, half) : 0);
    };
    expect_good(loss, {q, k}, {norm.q, norm.k});
  }
  const Tensor kept = q.value.clone();
  Tape quiet(false);
  const QueriesKeys over = qk_norm_rope(quiet, {Tape::constant(kept), Tape::constant(k.value.clone())}, norm, turns);
  EXPECT_EQ(over.q.value.raw(), kept.raw());  // nothing is recorded: in place
}

// The residual stream as the blocks hand it on: each norm adds the branch before it; sum and norm are both read.
TEST(Autograd, AddRmsNorm) {
  const Var x = variable({3, 4}, 1);
  const ParameterPtr w = parameter({4, 4}, 2), norm = parameter({4}, 3), last = parameter({4}, 4);
  const Tensor weights = random_tensor({3, 4}, DType::kF64, 5);
  const auto loss = [&](Tape& tape) {
    Var sum = x, branch;
    for (int layer = 0; layer < 3; ++layer) {
      const Normed n = add_rms_norm(tape, sum, branch, norm, 1e-5);
      sum = n.sum, branch = linear(tape, n.y, w, {});
    }
    return dot_loss(tape, add_rms_norm(tape, sum, branch, last, 1e-5).y, weights);
  };
  expect_good(loss, {x}, {w, norm, last});
  // Sum alone, and norm alone, reach the loss.
  const Var branch = variable({3, 4}, 6);
  for (const bool of_sum : {false, true}) {
    const auto one = [&](Tape& tape) {
      const Normed n = add_rms_norm(tape, x, copy_of(branch), norm, 1e-5);
      return dot_loss(tape, of_sum ? n.sum : n.y, weights);
    };
    expect_good(one, {x, branch}, {norm});
  }
}

TEST(Autograd, ResidualWithBothPaths) {
  const Var x = variable({3, 4}, 1);
  const ParameterPtr w = parameter({4, 4}, 2), norm = parameter({4}, 3);
  const Tensor weights = random_tensor({3, 4}, DType::kF64, 4);
  const auto loss = [&](Tape& tape) {
    Var y = x;
    for (int layer = 0; layer < 3; ++layer) {
      y = add_in_place(tape, y, linear(tape, rms_norm(tape, y, norm, 1e-5), w, {}));
    }
    return dot_loss(tape, y, weights);
  };
  expect_good(loss, {x}, {w, norm});
}

TEST(Autograd, Attention) {
  const Var q = variable({7, 12}, 1), k = variable({7, 6}, 2), v = variable({7, 6}, 3);
  const Tensor weights = random_tensor({7, 12}, DType::kF64, 4);
  const AttentionSequences two{.q_begin = Tensor::from<int32_t>({0, 4, 7}, {3}),
                               .k_begin = Tensor::from<int32_t>({0, 4}, {2}),
                               .k_count = Tensor::from<int32_t>({4, 3}, {2}),
                               .q_pos = Tensor::from<int32_t>({0, 0}, {2})};
  expect_good([&](Tape& tape) { return dot_loss(tape, attention(tape, q, k, v, two, 3), weights); }, {q, k, v});
}

TEST(Autograd, RouterThroughGatesAndProbabilities) {
  for (const bool renormalize : {false, true}) {
    const Var x = variable({5, 6}, 1);
    const ParameterPtr w = parameter({8, 6}, 2);
    const Tensor on_gates = random_tensor({5, 3}, DType::kF64, 3), on_probs = random_tensor({5, 8}, DType::kF64, 4);
    const auto loss = [&](Tape& tape) {
      const Routing r = router(tape, x, w, {}, 3, renormalize);
      return dot_loss(tape, r.gates, on_gates) + dot_loss(tape, r.probs, on_probs);
    };
    expect_good(loss, {x}, {w});
  }
}

TEST(Autograd, LoadBalanceLossPooledOverLayers) {
  const Var x = variable({5, 6}, 1);
  const ParameterPtr w1 = parameter({8, 6}, 2), w2 = parameter({8, 6}, 3);
  const Tensor mask = Tensor::from<uint8_t>({1, 1, 0, 1, 1}, {5});
  const double scale = 0.3;
  const auto loss = [&](Tape& tape) {
    const Routing a = router(tape, x, w1, {}, 2, false), b = router(tape, x, w2, {}, 2, false);
    return scale * load_balance_loss(tape, {a.probs, b.probs}, {a.slots, b.slots}, mask, scale).value();
  };
  expect_good(loss, {x}, {w1, w2});
}

TEST(Autograd, RouterEntropy) {
  const Var x = variable({5, 6}, 1);
  const ParameterPtr w1 = parameter({8, 6}, 2), w2 = parameter({8, 6}, 3);
  const Tensor mask = Tensor::from<uint8_t>({1, 1, 0, 1, 1}, {5}),
               removed = Tensor::from<uint8_t>({0, 1, 0, 0, 0, 1, 0, 0}, {8});
  const double scale = 0.3;
  const auto loss = [&](Tape& tape) {
    const Routing a = router(tape, x, w1, removed, 2, false), b = router(tape, x, w2, {}, 2, false);
    return scale * router_entropy_loss(tape, {a.probs, b.probs}, mask, scale).value();
  };
  expect_good(loss, {x}, {w1, w2});
  // Four even probabilities, and a sure choice: (ln 4 + 0) / 2.
  Tape quiet(false);
  const Var p = Tape::constant(Tensor::from<double>({.25, .25, .25, .25, 0, 0, 1, 0}, {2, 4}));
  EXPECT_NEAR(router_entropy_loss(quiet, {p}, {}, 1).value(), std::log(4.) / 2, 1e-15);
}

TEST(Autograd, LmHeadLoss) {
  const Var x = variable({6, 5}, 1);
  const ParameterPtr w = parameter({9, 5}, 2);
  const Tensor labels = Tensor::from<int32_t>({3, -100, 0, 8, 8, -100}, {6});
  const double scale = 0.25;
  expect_good([&](Tape& tape) { return scale * lm_head_loss(tape, x, w, labels, scale, {}).value(); }, {x}, {w});
}

// A small block with a shared input and two outputs, run directly or recomputed.
std::vector<Var> block(Tape& tape, const Var& x, const std::vector<ParameterPtr>& w) {
  const Var n = rms_norm(tape, x, w[0], 1e-5);
  const Var h = swiglu(tape, linear(tape, n, w[1], {}));
  const Var p = linear(tape, n, w[2], {});
  return {add_in_place(tape, x, linear(tape, h, w[3], {})), p};
}

TEST(Autograd, CheckpointGivesTheSameBits) {
  const std::vector<ParameterPtr> w{parameter({4}, 1), parameter({6, 4}, 2), parameter({5, 4}, 3),
                                    parameter({4, 3}, 4)};
  const Tensor on_y = random_tensor({3, 4}, DType::kF64, 5), on_p = random_tensor({3, 5}, DType::kF64, 6);
  std::vector<Tensor> direct, recomputed;
  for (const bool recompute : {false, true}) {
    const Var x = variable({3, 4}, 7);
    for (const ParameterPtr& p : w) p->zero_grad();
    Tape tape;
    Var y = x;
    for (int layer = 0; layer < 2; ++layer) {
      const auto f = [&](Tape& t, const std::vector<Var>& in) { return block(t, in[0], w); };
      const std::vector<Var> out = recompute ? tape.checkpoint({y}, f) : f(tape, {y});
      y = out[0];
      dot_loss(tape, out[1], on_p);
    }
    dot_loss(tape, y, on_y);
    if (recompute) {
      EXPECT_EQ(tape.size(), 5u);  // one closure a block, one a root
    }
    tape.backward();
    std::vector<Tensor>& grads = recompute ? recomputed : direct;
    grads.push_back(x.grad->take());
    for (const ParameterPtr& p : w) grads.push_back(p->grad.clone());
  }
  for (size_t i = 0; i < direct.size(); ++i) EXPECT_TRUE(bits_equal(direct[i], recomputed[i])) << i;
}

TEST(Autograd, NothingIsRecordedWithoutGradients) {
  const ParameterPtr w = parameter({4, 4}, 1);
  w->trainable = false;
  Tape tape;
  const Var constant = Tape::constant(random_tensor({3, 4}, DType::kF64, 2));
  const Var y = linear(tape, constant, w, {});
  EXPECT_FALSE(y.needs_grad());
  EXPECT_EQ(tape.size(), 0u);
  // Under an input with a gradient the frozen weight passes it on, without memory of its own.
  const Var x = variable({3, 4}, 3);
  dot_loss(tape, linear(tape, x, w, {}), random_tensor({3, 4}, DType::kF64, 4));
  tape.backward();
  EXPECT_TRUE(x.grad->value().defined());
  EXPECT_FALSE(w->grad.defined());
}

TEST(Autograd, ActivationsAreReleasedAsBackwardPasses) {
  constexpr int kLayers = 6;
  constexpr int64_t kRows = 64, kWidth = 64, kBytes = kRows * kWidth * 8;
  std::vector<ParameterPtr> w;
  for (int i = 0; i < kLayers; ++i) w.push_back(parameter({kWidth, kWidth}, static_cast<uint64_t>(i), 0.1));
  for (const ParameterPtr& p : w) p->ensure_grad();
  const Tensor weights = random_tensor({kRows, kWidth}, DType::kF64, 9);
  const auto live = [] { return memory_use(MemoryCategory::kActivations).live_bytes; };
  const int64_t before = live();
  Tape tape;
  {
    Var y = Tape::variable(random_tensor({kRows, kWidth}, DType::kF64, 8));
    for (const ParameterPtr& p : w) y = linear(tape, y, p, {});
    dot_loss(tape, y, weights);
  }
  EXPECT_EQ(live() - before, kLayers * kBytes);  // the input of each layer; the last output is not kept
  reset_peak_memory();
  tape.backward();
  // While a layer's backward runs its input is still held, and two gradients: never more than at the start plus those.
  EXPECT_LE(memory_use(MemoryCategory::kActivations).peak_bytes - before, (kLayers + 2) * kBytes);
  EXPECT_EQ(live() - before, 0);
}

TEST(Autograd, CheapValuesAreRebuiltInsteadOfKept) {
  constexpr int64_t kRows = 32, kWidth = 16, kBytes = kRows * kWidth * 8;
  const ParameterPtr norm = parameter({kWidth}, 1), w1 = parameter({kWidth, kWidth}, 2),
                     w2 = parameter({kWidth, kWidth}, 3);
  std::vector<int32_t> places(kRows);
  for (int32_t i = 0; i < kRows; ++i) places[static_cast<size_t>(i)] = i;
  const HeadTurns turns{.positions = Tensor::from(places, {kRows}), .head_dim = 4};
  const auto chain = [&](Tape& tape, const Var& x) {  // as the queries go, and twice into products
    const Var n = clamp(tape, rms_norm(tape, x, norm, 1e-5), 1.1);
    const Var y = qk_norm_rope(tape, {n, Var{}}, {.q = norm, .k = nullptr, .eps = 1e-5}, turns).q;
    return add_in_place(tape, linear(tape, y, w1, {}), linear(tape, y, w2, {}));
  };
  const Var x = variable({kRows, kWidth}, 4);
  const Tensor weights = random_tensor({kRows, kWidth}, DType::kF64, 5);
  expect_good([&](Tape& tape) { return dot_loss(tape, chain(tape, x), weights); }, {x}, {norm, w1, w2});
  const int64_t before = memory_use(MemoryCategory::kActivations).live_bytes;
  Tape tape;
  dot_loss(tape, chain(tape, x), weights);
  EXPECT_EQ(memory_use(MemoryCategory::kActivations).live_bytes - before, 2 * kRows * 8);  // the norms' 1 / rms alone
  EXPECT_LT(2 * kRows * 8, kBytes);
}

TEST(Autograd, SharedGradientsAreNotWrittenOver) {
  GradSlot a, b;
  const Tensor dy = random_tensor({2, 2}, DType::kF64, 1), kept = dy.clone();
  a.share(dy), b.share(dy);
  bool accumulate = false;
  a.target({2, 2}, DType::kF64, &accumulate).fill_zero();
  EXPECT_TRUE(accumulate);
  EXPECT_TRUE(bits_equal(b.value(), kept));
  b.add(random_tensor({2, 2}, DType::kF64, 2));
  EXPECT_TRUE(bits_equal(dy, kept));
}

TEST(Autograd, ZeroGradIsLazyAndExact) {
  const ParameterPtr p = parameter({2, 2}, 1), q = parameter({2, 2}, 2);
  EXPECT_EQ(p->grad_beta(), 0);
  EXPECT_EQ(p->grad_beta(), 1);
  run(Scale{.alpha = 0, .x = p->grad, .y = p->grad});
  p->grad.data<double>()[0] = 5;
  EXPECT_EQ(grad_beta_of({p, nullptr, q, q}), 1);  // q is new and becomes zeros
  for (int i = 0; i < 4; ++i) EXPECT_EQ(q->grad.data<double>()[i], 0);
  EXPECT_EQ(p->ensure_grad().data<double>()[0], 5);
  p->zero_grad(), q->zero_grad();
  EXPECT_EQ(p->ensure_grad().data<double>()[0], 0);
  p->zero_grad();
  EXPECT_EQ(grad_beta_of({p, q}), 0);
  p->trainable = false;
  EXPECT_THROW(p->ensure_grad(), Error);
}

}  // namespace
}  // namespace lightmoe
