// The MoE op on every device and in every execution (fused or step by step, base once per token or once per slot) against the
// materialised form (tests/support/moe_layers.h).

#include "model/moe_op.h"
#include "tests/support/devices.h"
#include "tests/support/moe_layers.h"

namespace lightmoe {
namespace {

using testing::close;
using testing::DenseMoe;
using testing::LayerSpec;
using testing::make_layer;
using testing::random_slots;
using testing::random_tensor;

// Bases with adapters beside kept experts, kept ones with adapters, too; several ranks; all slots on one base; no adapter; a zero base;
// shared slots without adapter (gates add); annealing; widths that divide no tile; latents plain and mixed; adapters wider than experts.
const std::vector<LayerSpec> kSpecs{
    {.name = "plain", .expert_of_slot = {0, 1, 2, 3, 4}},
    {.name = "two bases, two kept",
     .hidden = 40,
     .width = 72,
     .expert_of_slot = {0, 2, 3, 2, 1, 3, 2},
     .rank_of_slot = {4, 4, 4, 4, 4, 4, 4},
     .frozen_experts = {0, 1}},
    {.name = "adapters on some, two ranks",
     .hidden = 33,
     .width = 17,
     .expert_of_slot = {0, 0, 0, 0, 1, 1, 2},
     .rank_of_slot = {0, 20, 0, 6, 6, 20, 0}},
    {.name = "one base for all", .expert_of_slot = {0, 0, 0, 0}, .rank_of_slot = {16, 16, 16, 16}},
    {.name = "shared without adapters", .expert_of_slot = {0, 1, 0, 1, 2, 0}},
    {.name = "zero base", .expert_of_slot = {0, 1, 1, 1, 2}, .rank_of_slot = {2, 2, 2, 2, 2}, .zero_experts = {1}},
    {.name = "removed slots", .expert_of_slot = {0, -1, 1, 1, -1, 3, 2}, .rank_of_slot = {0, 0, 3, 3, 0, 0, 0}},
    {.name = "annealing",
     .expert_of_slot = {0, 1, 2, 1, 2, 1},
     .rank_of_slot = {2, 2, 2, 2, 2, 2},
     .annealed_slots = {1, 2, 3},
     .beta = 0.5,
     .frozen_experts = {0}},
    {.name = "latents with shared down projections",
     .expert_of_slot = {-1, 0, -1, -1, -1},
     .rank_of_slot = {0, 2, 0, 2, 0},
     .projection_of_slot = {0, -1, 1, 1, 0},
     .latent_down = true},
    {.name = "mixed latents of low rank with adapters",
     .expert_of_slot = {-1, -1, 0, -1, -1},
     .rank_of_slot = {1, 0, 2, 1, 0},
     .projection_of_slot = {0, 0, -1, 0, 0},
     .latent_size = 5,
     .latent_down = true,
     .mix_of = 4,
     .projection_rank = 2},
    {.name = "adapters wider than their experts",
     .expert_of_slot = {0, 1, 0, 2, 1, 3},
     .rank_of_slot = {2, 3, 2, 2, 0, 0},
     .frozen_experts = {2},
     .width_of_expert = {4, 7, 4, 10},
     .wide_adapters = true},
};

std::vector<int32_t> live_slots(const MoeLayer& layer) {
  std::vector<int32_t> live;
  for (size_t s = 0; s < layer.slots.size(); ++s) {
    if (layer.slots[s].kind != SlotKind::kRemoved) live.push_back(static_cast<int32_t>(s));
  }
  return live;
}

struct Choice {
  int64_t tokens, top_k;
  bool skewed;
};

void check_layer(const MoeLayer& layer, const Choice& choice, DType dtype, GemmCompute compute, double tolerance) {
  const int64_t hidden = layer.router->value.dim(1);
  std::vector<int32_t> allowed = live_slots(layer);
  if (choice.skewed) allowed.resize(static_cast<size_t>(choice.top_k));  // the other slots stay empty
  const Tensor slots = random_slots(choice.tokens, choice.top_k, allowed, 102);
  const Var x = Tape::variable(random_tensor({choice.tokens, hidden}, dtype, 100)),
            gates = Tape::variable(random_tensor({choice.tokens, choice.top_k}, dtype, 101, 0.5));
  const Tensor dy = random_tensor({choice.tokens, hidden}, dtype, 103);
  const DenseMoe expected(layer, x.value, slots, gates.value, dy);
  for (const ParameterPtr& p : layer.parameters()) p->zero_grad();
  Tape tape;
  const Var y = moe_experts(tape, x, layer, slots, gates, compute);
  EXPECT_TRUE(close(y.value, expected.y, tolerance)) << "y";
  y.grad->share(dy);
  tape.backward();
  EXPECT_TRUE(close(x.grad->take(), expected.dx, tolerance)) << "dx";
  EXPECT_TRUE(close(gates.grad->take(), expected.dgates, tolerance)) << "dgates";
  for (const ParameterPtr& p : layer.parameters()) {
    if (p == layer.router || !p->trainable) continue;
    const auto it = expected.gradients.find(p.get());
    const std::vector<double> zeros(static_cast<size_t>(p->value.numel()), 0);
    EXPECT_TRUE(close(p->ensure_grad(), it == expected.gradients.end() ? zeros : it->second, tolerance)) << p->name;
  }
}

const std::vector<MoeExecution> kExecutions{
    {true, MoeFusion::kOn}, {false, MoeFusion::kOn}, {true, MoeFusion::kOff}, {false, MoeFusion::kOff}};

class MoeOnDevices : public ::testing::TestWithParam<LayerSpec> {};

TEST_P(MoeOnDevices, EveryExecutionEqualsTheMaterialisedForm) {
  for (const DeviceKind device : testing::devices()) {
    SCOPED_TRACE(name_of(device));
    const DeviceScope scope(device);
    const bool on_cpu = device == DeviceKind::kCpu;
    const DType dtype = on_cpu ? DType::kF64 : DType::kF32;
    // Two products deep, a third in backward, sums over at most tokens * K rows (tests/moe_test.cpp).
    const double tolerance = on_cpu ? 1e-12 : 3 * testing::sum_tolerance(DType::kF32, 200);
    const MoeLayer layer = make_layer(GetParam(), dtype, dtype, 1);
    for (const MoeExecution& execution : kExecutions) {
      SCOPED_TRACE(::testing::Message() << "base once " << execution.base_once << ", fused "
                                        << (execution.fused == MoeFusion::kOn));
      const MoeExecutionScope chosen(execution);
      check_layer(layer, {29, 3, false}, dtype, GemmCompute::kF32, tolerance);
      check_layer(layer, {1, 2, false}, dtype, GemmCompute::kF32, tolerance);
      check_layer(layer, {0, 2, false}, dtype, GemmCompute::kF32, tolerance);
    }
    check_layer(layer, {70, 2, true}, dtype, GemmCompute::kF32, tolerance);
  }
}

// Rows and factors of bf16: h0, u, a, s, ds, e, dh, the visits' rows and every weight are rounded once, each by at most 2^-9 of itself; a
// result passes through at most eight of them in turn, and errors of single terms average out in its sums.
TEST_P(MoeOnDevices, FusedInBf16EqualsTheMaterialisedForm) {
  constexpr double kTolerance = 8 * 0x1p-8;
  for (const DeviceKind device : testing::devices()) {
    if (device == DeviceKind::kCpu) continue;
    SCOPED_TRACE(name_of(device));
    const DeviceScope scope(device);
    for (const DType trained : {DType::kF32, DType::kBF16}) {
      check_layer(make_layer(GetParam(), DType::kBF16, trained, 2), {33, 3, false}, DType::kF32, GemmCompute::kBF16,
                  kTolerance);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Layers, MoeOnDevices, ::testing::ValuesIn(kSpecs), [](const auto& info) {
  std::string name;
  for (const char* c = info.param.name; *c != 0; ++c) name += std::isalnum(static_cast<unsigned char>(*c)) ? *c : '_';
  return name;
});

// Slots 0 and 2 share expert 0, 3 and 4 expert 1; slot 1 is a kept expert (with an adapter, which does not make it replaced).
TEST(MoeHistogram, CountsReplacedSlotsAndDistinctBases) {
  const MoeLayer layer = make_layer({.name = "", .expert_of_slot = {0, 2, 0, 1, 1}, .rank_of_slot = {1, 1, 1, 0, 1}},
                                    DType::kF32, DType::kF32, 3);
  const Tensor slots = Tensor::from<int32_t>({1, 0, 2, 0, 3, 4, 0, 3, 2}, {3, 3});
  ReplacedHistogram histogram = replaced_histogram(layer, slots);
  EXPECT_EQ(histogram.replaced, (std::vector<int64_t>{0, 0, 1, 2}));
  EXPECT_EQ(histogram.distinct_bases, (std::vector<int64_t>{0, 1, 2, 0}));
  histogram.add(replaced_histogram(layer, Tensor::from<int32_t>({1, 1, 1}, {1, 3})));
  EXPECT_EQ(histogram.replaced, (std::vector<int64_t>{1, 0, 1, 2}));
  EXPECT_DOUBLE_EQ(histogram.mean_replaced(), 2);
  EXPECT_DOUBLE_EQ(histogram.mean_distinct_bases(), 1.25);
}

}  // namespace
}  // namespace lightmoe
