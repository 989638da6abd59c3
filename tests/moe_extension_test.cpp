// Extensions of MoE blocks: what each computes by its plain definition, nothing at the start, gradients, files, what is refused.

#include "model/moe_extension.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <numeric>

#include "autograd/gradcheck.h"
#include "compress/exporter.h"
#include "compress/recover.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/extend.h"
#include "model/moe_modulated.h"
#include "model/moe_op.h"
#include "model/routing.h"
#include "model/summary.h"
#include "model/verify.h"
#include "model/weights.h"
#include "tests/support/compression.h"
#include "tests/support/program.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

namespace fs = std::filesystem;
using testing::close;
using testing::fails_with;
using testing::random_tensor;
using testing::TempDir;
using testing::to_doubles;

constexpr int64_t kHidden = 12, kWidth = 10, kSlots = 6, kTopK = 3, kTokens = 5;

OlmoeConfig tiny_config() {
  OlmoeConfig c;
  c.vocab_size = 23, c.hidden_size = kHidden, c.intermediate_size = kWidth, c.num_layers = 2, c.num_heads = 2;
  c.num_kv_heads = 1, c.num_experts = kSlots, c.num_experts_per_token = kTopK, c.max_position_embeddings = 64;
  c.rms_norm_eps = 1e-5, c.initializer_range = .4, c.eos_token_ids = {0}, c.pad_token_id = 1;
  return c;
}

// With small settings that do not divide evenly, where a kind has such.
const std::vector<std::string> kBeside = {"pesc:experts=3,top_k=2,rank=2", "mor1e:experts=5,clusters=3",
                                          "smore:residuals=3,fanout=2,rank=2,gate=4", "mode:width=7"};
const std::vector<std::string> kInstead = {"compressed-experts:auxiliary=1", "dsmoe:blocks=5", "moefication:blocks=5"};

Batch some_batch() {
  std::vector<int32_t> ids, labels;
  Philox random(9);
  for (int i = 0; i < 18; ++i) {
    ids.push_back(static_cast<int32_t>(random.below(23)));
    labels.push_back(i % 5 == 2 ? -100 : ids.back());
  }
  std::vector<uint8_t> mask(18, 1);
  mask[17] = mask[16] = 0;
  return make_batch(ids, 2, 9, labels, mask);
}

std::unique_ptr<Olmoe> extended(const std::string& text, DType dtype, bool as_started = false) {
  std::unique_ptr<Olmoe> model = random_model(tiny_config(), dtype, 3);
  extend_model(*model, parse_extension(text), 7);
  uint64_t seed = 100;
  for (const Block& block : model->blocks) {
    for (const ExtensionTensor& t : block.moe.extension->tensors()) {
      if (!as_started) t.parameter->value.copy_from(random_tensor(t.parameter->value.shape(), dtype, seed++, .7));
    }
  }
  return model;
}

TEST(Extensions, BesideTheExpertsStartAsNothing) {
  const Batch batch = some_batch();
  const Tensor plain = random_model(tiny_config(), DType::kF64, 3)->forward(batch, {});
  for (const std::string& text : kBeside) {
    EXPECT_TRUE(close(extended(text, DType::kF64, true)->forward(batch, {}), to_doubles(plain), 0)) << text;
    EXPECT_FALSE(close(extended(text, DType::kF64)->forward(batch, {}), to_doubles(plain), 1e-3)) << text;
  }
}

// --- plain definitions ---------------------------------------------------------------------------------------

using Vector = std::vector<double>;
using Tensors = std::map<std::string, Tensor>;

Tensors tensors_of(const MoeExtension& extension) {
  Tensors all;
  for (const ExtensionTensor& t : extension.tensors()) all[t.name] = t.parameter->value;
  return all;
}
Vector times(const Tensor& w, const Vector& x, int64_t first = 0, int64_t rows = -1) {
  Vector y(static_cast<size_t>(rows < 0 ? w.dim(0) : rows), 0.0);
  for (size_t i = 0; i < y.size(); ++i) {
    for (size_t j = 0; j < x.size(); ++j)
      y[i] += w.data<double>()[(first + static_cast<int64_t>(i)) * w.dim(1) + static_cast<int64_t>(j)] * x[j];
  }
  return y;
}
Vector softmax_of_largest(const Vector& z, int64_t k) {
  std::vector<size_t> order(z.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return z[a] > z[b]; });
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += std::exp(z[order[static_cast<size_t>(i)]]);
  Vector p(z.size(), 0.0);
  for (int64_t i = 0; i < k; ++i) p[order[static_cast<size_t>(i)]] = std::exp(z[order[static_cast<size_t>(i)]]) / sum;
  return p;
}
double gelu(double v) { return .5 * v * std::erfc(-v / std::sqrt(2.0)); }
Vector mapped(Vector v, double (*f)(double)) {
  for (double& x : v) x = f(x);
  return v;
}

Vector pesc(const Tensors& t, const Vector& x) {  // 3 adapters of rank 2, of which 2
  const Vector w = softmax_of_largest(times(t.at("gate"), x), 2);
  Vector y(kHidden, 0.0);
  for (int64_t i = 0; i < 3; ++i) {
    const Vector hidden = mapped(times(t.at("down"), x, 2 * i, 2), gelu);
    for (int64_t d = 0; d < kHidden; ++d) {
      for (int64_t j = 0; j < 2; ++j)
        y[static_cast<size_t>(d)] +=
            w[static_cast<size_t>(i)] * t.at("up").data<double>()[d * 6 + 2 * i + j] * hidden[static_cast<size_t>(j)];
    }
  }
  return y;
}

Vector mor1e(const Tensors& t, const Vector& x) {  // 5 of rank 1, 3 clusters
  Vector likeness = times(t.at("clusters"), x);
  for (double& v : likeness) v /= std::sqrt(static_cast<double>(kHidden));
  Vector logits = times(t.at("gate"), x);
  const Vector intuition = times(t.at("intuition"), softmax_of_largest(likeness, 3));
  for (size_t e = 0; e < logits.size(); ++e) logits[e] += intuition[e];
  const Vector g = softmax_of_largest(logits, 5), a = times(t.at("a"), x);
  Vector y(kHidden, 0.0);
  for (int64_t d = 0; d < kHidden; ++d) {
    for (int64_t e = 0; e < 5; ++e)
      y[static_cast<size_t>(d)] +=
          g[static_cast<size_t>(e)] * t.at("b").data<double>()[d * 5 + e] * a[static_cast<size_t>(e)];
  }
  return y;
}

Vector smore(const Tensors& t, const Vector& x) {  // 3 residuals of rank 2 a level, 2 picked, gates of 4
  const Vector low = times(t.at("project"), x);
  const Vector parents = softmax_of_largest(times(t.at("parent_keys"), low), 2);
  Vector h2(12, 0.0);
  for (int64_t i = 0; i < 3; ++i) {
    if (parents[static_cast<size_t>(i)] == 0) continue;  // not picked: its branch is not there at all
    const double* key = t.at("parent_keys").data<double>() + 4 * i;
    Vector logits = times(t.at("child_keys_x"), low);
    const Vector of_parent = times(t.at("child_keys_parent"), Vector(key, key + 4));
    for (size_t j = 0; j < 3; ++j) logits[j] += of_parent[j];
    const Vector children = softmax_of_largest(logits, 2);
    Vector h1(6, 0.0);
    for (int64_t j = 0; j < 3; ++j) {
      const Vector leaf = mapped(times(t.at("b0"), times(t.at("a0"), x, 2 * j, 2), 6 * j, 6), std::tanh);
      for (size_t d = 0; d < 6; ++d) h1[d] += children[static_cast<size_t>(j)] * leaf[d];
    }
    Vector branch = times(t.at("b1"), times(t.at("a1"), x, 2 * i, 2), 12 * i, 12);
    const Vector lifted = times(t.at("lift"), h1);
    for (size_t d = 0; d < 12; ++d) h2[d] += parents[static_cast<size_t>(i)] * std::tanh(branch[d] + lifted[d]);
  }
  return times(t.at("final"), h2);
}

Vector mode(const Tensors& t, const Vector& x) {  // width 7
  const Vector h = times(t.at("gate_up"), x);
  Vector a(7);
  for (size_t j = 0; j < 7; ++j) a[j] = h[j] / (1 + std::exp(-h[j])) * h[7 + j];
  Vector y = times(t.at("down"), a);
  for (double& v : y) v *= t.at("alpha").data<double>()[0];
  return y;
}

// One block of an extended model, and what it is called with.
struct BlockCase {
  std::unique_ptr<Olmoe> model;
  Var x = Tape::variable(random_tensor({kTokens, kHidden}, DType::kF64, 21)),
      gates = Tape::variable(random_tensor({kTokens, kTopK}, DType::kF64, 22, .3));
  Tensor slots = Tensor::from<int32_t>({0, 1, 2, 0, 4, 5, 0, 3, 2, 0, 5, 1, 0, 2, 4}, {kTokens, kTopK});
  explicit BlockCase(const std::string& text) : model(extended(text, DType::kF64)) {}
  const MoeLayer& layer() const { return model->blocks[0].moe; }
  MoeResult run(Tape& tape, const RoutingOptions* routing = nullptr) const {
    return run_moe(tape, {.x = x, .layer = layer(), .slots = slots, .gates = gates, .routing = routing});
  }
  Tensor experts() const {
    Tape tape(false);
    return moe_experts(tape, x, layer(), slots, gates, GemmCompute::kF32).value;
  }
  std::vector<ParameterPtr> parameters() const {
    std::vector<ParameterPtr> all = layer().parameters();
    all.erase(all.begin());  // the router takes no part
    return all;
  }
};

TEST(Extensions, BesideTheExpertsAreTheirDefinitions) {
  Vector (*definitions[])(const Tensors&, const Vector&) = {&pesc, &mor1e, &smore, &mode};
  for (size_t i = 0; i < kBeside.size(); ++i) {
    const BlockCase c(kBeside[i]);
    const Tensors t = tensors_of(*c.layer().extension);
    Vector expected = to_doubles(c.experts());
    for (int64_t token = 0; token < kTokens; ++token) {
      const double* x = c.x.value.data<double>() + token * kHidden;
      const Vector side = definitions[i](t, Vector(x, x + kHidden));
      for (size_t d = 0; d < side.size(); ++d) expected[static_cast<size_t>(token * kHidden) + d] += side[d];
    }
    Tape tape(false);
    EXPECT_TRUE(close(c.run(tape).y.value, expected, 1e-13)) << kBeside[i];  // a few hundred products in double
  }
}

TEST(Extensions, Gradients) {
  std::vector<std::string> smooth = kBeside;
  smooth.push_back("compressed-experts:auxiliary=1"), smooth.push_back("compressed-experts:auxiliary=2");
  for (const std::string& text : smooth) {
    const BlockCase c(text);
    const Tensor weights = random_tensor({kTokens, kHidden}, DType::kF64, 23);
    const GradCheckReport report = check_gradients([&](Tape& tape) { return dot_loss(tape, c.run(tape).y, weights); },
                                                   {c.x, c.gates}, c.parameters());
    EXPECT_LT(report.worst, 1e-6) << text << " " << report.where;
    EXPECT_GT(report.checked, 300) << text;
  }
}

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

// --- files ------------------------------------------------------------------------------------------------------

TEST(ExtensionFiles, ComeBackBitForBit) {
  std::vector<std::string> all = kBeside;
  all.insert(all.end(), kInstead.begin(), kInstead.end());
  for (const std::string& text : all) {
    const TempDir where, other;
    const auto model = extended(text, DType::kF32);
    save_model(*model, where.path(), DType::kF32, int64_t{1} << 30);
    const auto again = load_model(where.path(), DType::kF32);
    EXPECT_EQ(again->blocks[1].moe.extension->shape().text(), parse_extension(text).text());
    EXPECT_TRUE(testing::bits_equal(model->forward(some_batch(), {}), again->forward(some_batch(), {}))) << text;
    EXPECT_TRUE(verify_model(where.path()).ok()) << text;
    const ModelSummary summary = summarize_model(where.path());
    EXPECT_EQ(summary.layers[0].extension, parse_extension(text).text());
    const int64_t counted = summary.kinds[static_cast<size_t>(ParameterKind::kExtension)].parameters;
    EXPECT_EQ(counted,
              2 * extension_parameters(parse_extension(text), {.hidden = kHidden, .width = kWidth, .slots = kSlots}));
    EXPECT_EQ(model->num_parameters(), summary.total.parameters);
    const auto exporting = [&] { export_to_hugging_face({.model = where.path(), .output = other / "stock"}); };
    if (!find_extension(text.substr(0, text.find(':'))).may_be_left) {
      EXPECT_TRUE(
          fails_with(ErrorKind::kInput, {text.substr(0, text.find(':')), "stock model has no place"}, exporting));
      continue;
    }
    exporting();
    EXPECT_TRUE(testing::bits_equal(load_model(other / "stock", DType::kF32)->forward(some_batch(), {}),
                                    model->forward(some_batch(), {})));
  }
}

TEST(ExtensionFiles, BadOnesAreNamed) {
  const TempDir where;
  save_model(*extended("pesc:experts=3,top_k=2,rank=2", DType::kF32), where.path(), DType::kF32, int64_t{1} << 30);
  const std::string config = testing::get_file(where / "config.json");
  const Json parsed = Json::parse(config);
  const auto with = [&](const char* key, const Json& value, const std::vector<std::string>& pieces) {
    Json changed = parsed;
    changed["lightmoe"]["layers"][0]["extension"][key] = value;
    testing::put_file(where / "config.json", changed.dump());
    return fails_with(ErrorKind::kInput, pieces, [&] { load_model(where.path(), DType::kF32); });
  };
  EXPECT_TRUE(with("kind", "lora", {"lightmoe.layers[0]", "\"lora\"", "pesc"}));
  EXPECT_TRUE(with("kind", 3, {"extension has no kind"}));
  EXPECT_TRUE(with("rank", "two", {"rank is missing or no integer"}));
  EXPECT_TRUE(with("rank", 0, {"rank is 0", "1 to"}));
  EXPECT_TRUE(with("rank", uint64_t{1} << 63, {"rank is"}));
  EXPECT_TRUE(with("top_k", 4, {"top_k is more than experts"}));
  EXPECT_TRUE(with("rank", 3, {"pesc.down", "[6, 12], expected [9, 12]"}));
}

TEST(Extensions, BadSettingsAreOneLine) {
  const auto usage = [](const std::string& text, const std::vector<std::string>& pieces) {
    return fails_with(ErrorKind::kUsage, pieces, [&] {
      const auto model = random_model(tiny_config(), DType::kF32, 3);
      extend_model(*model, parse_extension(text), 1);
    });
  };
  EXPECT_TRUE(usage("pecs", {"\"pecs\"", "did you mean pesc"}));
  EXPECT_TRUE(usage("pesc:rank", {"\"rank\" is not NAME=NUMBER"}));
  EXPECT_TRUE(usage("pesc:width=3", {"no setting \"width\"", "experts=8"}));
  EXPECT_TRUE(usage("pesc:rank=2x", {"rank is \"2x\""}));
  EXPECT_TRUE(usage("pesc:rank=0", {"rank is 0"}));
  EXPECT_TRUE(usage("dsmoe:blocks=3", {"do not divide"}));
  EXPECT_TRUE(usage("compressed-experts:auxiliary=3", {"leaves no main choice"}));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"layer 0 has the extension mode:width=7 already"},
                         [] { extend_model(*extended("mode:width=7", DType::kF32), parse_extension("pesc"), 1); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"layer 1 has slots without an expert of their own"}, [] {
    const auto model = random_model(tiny_config(), DType::kF32, 3);
    model->blocks[1].moe.slots[2].expert = 1;
    extend_model(*model, parse_extension("dsmoe:blocks=2"), 1);
  }));
}

// --- training ---------------------------------------------------------------------------------------------------

TEST(Extensions, RecoveryTrainsThemAlone) {
  const testing::CompressionGround& ground = testing::CompressionGround::golden();
  for (const char* text : {"pesc", "mor1e", "smore", "mode"}) {
    SCOPED_TRACE(text);
    const TempDir where;
    ground.compress("reap", .4, where / "out");
    RecoveryOptions options;
    options.extend = parse_extension(text);
    Recovery recovery(where / "out", ground.model, 8, options);
    std::map<std::string, Tensor> before;
    int64_t trained = 0;
    for (const ParameterPtr& p : recovery.model().parameters()) {
      before[p->name] = p->value.clone();
      trained += p->trainable ? p->value.numel() : 0;
    }
    const double loss = ground.loss(recovery.model());
    EXPECT_NEAR(loss, ground.loss(where / "out"), 1e-6);  // nothing at the start
    DataStream data(ground.calibration, {.rows = 2, .length = 40});
    TrainerOptions training;
    training.steps = 8;
    training.schedule = {.kind = ScheduleKind::kConstant, .peak_lr = 1e-2, .total_steps = 8};
    training.progress.quiet = true;
    train(recovery.trainable(), data, training, recovery.hooks(DType::kF32));
    recovery.finish();
    EXPECT_LT(ground.loss(recovery.model()), loss);
    for (const ParameterPtr& p : recovery.model().parameters()) {
      const bool own = p->name.find(std::string(".mlp.") + text + ".") != std::string::npos;
      EXPECT_EQ(own, p->trainable) << p->name;
      EXPECT_EQ(own, !testing::bits_equal(p->value, before.at(p->name))) << p->name;
    }
    fs::create_directories(where / "saved");
    recovery.save(where / "saved", DType::kF32, nullptr);
    EXPECT_NEAR(ground.loss(where / "saved"), ground.loss(recovery.model()), 1e-6);
    const CompressionRecord record = read_record(where / "saved");
    EXPECT_EQ(record.trainable_parameters, trained);
    EXPECT_EQ(Checkpoint(where / "saved").total_bytes(), record.stored_bytes);
    EXPECT_EQ(record.stored_parameters,
              estimate_recovery(where / "out", options, DType::kF32, 40, Recompute::kNone).stored_parameters);
  }
}

TEST(Extensions, FromTheProgram) {
  const testing::CompressionGround& ground = testing::CompressionGround::golden();
  const TempDir where;
  const std::string tokens = ground.model / "golden.safetensors";
  save_statistics(ground.statistics, where / "s.safetensors");
  testing::ProgramResult run =
      testing::run_lightmoe({"train", ground.model, "--tokens", tokens, "--steps", "2", "--length", "40",
                             "--batch-rows", "1", "--extend", "mor1e:experts=4", "--extend-clusters",
                             where / "s.safetensors", "--train-only", "*.mlp.mor1e.*", "-o", where / "out"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const Checkpoint before(ground.model), after(where / "out");
  const Tensor router = before.file_of("model.layers.0.mlp.gate.weight").read("model.layers.0.mlp.gate.weight");
  EXPECT_TRUE(testing::bits_equal(
      router, after.file_of("model.layers.0.mlp.gate.weight").read("model.layers.0.mlp.gate.weight")));
  EXPECT_TRUE(after.contains("model.layers.1.mlp.mor1e.clusters"));
  run = testing::run_lightmoe({"inspect", where / "out"});
  EXPECT_NE(run.out.find("extension from layer 0 on: mor1e:clusters=8,experts=4"), std::string::npos) << run.out;
  run = testing::run_lightmoe({"eval", where / "out", "--tokens", tokens, "--device", "sim"});
  EXPECT_EQ(run.exit_code, 9) << run.err;
  EXPECT_NE(run.err.find("extension mor1e runs on the CPU only, not on sim"), std::string::npos) << run.err;
  EXPECT_EQ(std::count(run.err.begin(), run.err.end(), '\n'), 1) << run.err;
  run = testing::run_lightmoe(
      {"train", ground.model, "--tokens", tokens, "--steps", "2", "--extend", "lora", "-o", where / "no"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_NE(run.err.find("extension \"lora\""), std::string::npos) << run.err;
}

}  // namespace
}  // namespace lightmoe
