// The MoE op on the slot table against the materialised form (tests/support/moe_layers.h), forward and every gradient.

#include "autograd/gradcheck.h"
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

const std::vector<LayerSpec> kSpecs{
    {.name = "plain", .expert_of_slot = {0, 1, 2, 3, 4, 5}},
    {.name = "plain, some frozen", .expert_of_slot = {0, 1, 2, 3, 4, 5}, .frozen_experts = {0, 1, 4}},
    {.name = "adapters on all, nothing shared",
     .expert_of_slot = {0, 1, 2, 3, 4, 5},
     .rank_of_slot = {3, 3, 3, 3, 3, 3}},
    {.name = "two bases with adapters, two kept",
     .expert_of_slot = {0, 2, 3, 2, 1, 3, 2},
     .rank_of_slot = {2, 2, 2, 2, 2, 2, 2},
     .frozen_experts = {0, 1}},
    {.name = "shared without adapters: gates add", .expert_of_slot = {0, 1, 0, 1, 2, 0}},
    {.name = "shared, adapters on some",
     .expert_of_slot = {0, 0, 0, 0, 1, 1, 1},
     .rank_of_slot = {0, 2, 0, 2, 0, 0, 2}},
    {.name = "all on one base, no adapters", .expert_of_slot = {0, 0, 0, 0, 0}},
    {.name = "all on one base, adapters", .expert_of_slot = {0, 0, 0, 0, 0}, .rank_of_slot = {4, 4, 4, 4, 4}},
    {.name = "adapters of two ranks", .expert_of_slot = {0, 0, 1, 1, 1}, .rank_of_slot = {1, 3, 3, 1, 0}},
    {.name = "zero base with adapters",
     .expert_of_slot = {0, 1, 1, 1, 2},
     .rank_of_slot = {2, 2, 2, 2, 2},
     .zero_experts = {1},
     .frozen_experts = {0}},
    {.name = "zero base without adapter", .expert_of_slot = {0, 1, 1, 2, 0}, .zero_experts = {1}},
    {.name = "removed slots", .expert_of_slot = {0, -1, 1, 2, -1, 3, 4}},
    {.name = "constants beside experts",
     .expert_of_slot = {0, -1, 1, -1, 0, -1},
     .constant_of_slot = {-1, 0, -1, 1, -1, 0}},
    {.name = "constants and adapters",
     .expert_of_slot = {0, -1, 1, 0, -1},
     .rank_of_slot = {2, 0, 2, 2, 0},
     .constant_of_slot = {-1, 1, -1, -1, 0}},
    {.name = "latents of two projections",
     .expert_of_slot = {-1, -1, -1, -1, -1},
     .projection_of_slot = {0, 1, 0, 0, 1}},
    {.name = "latents with adapters beside experts",
     .expert_of_slot = {0, -1, -1, 1, -1, 0},
     .rank_of_slot = {2, 2, 0, 2, 2, 0},
     .projection_of_slot = {-1, 0, 1, -1, 0, -1}},
    {.name = "latents with shared down projections",
     .expert_of_slot = {-1, 0, -1, -1, -1},
     .rank_of_slot = {0, 2, 0, 2, 0},
     .projection_of_slot = {0, -1, 1, 1, 0},
     .latent_down = true},
    {.name = "mixed latents",
     .expert_of_slot = {-1, -1, -1, -1, 0},
     .projection_of_slot = {0, 0, 0, 0, -1},
     .mix_of = 3},
    {.name = "mixed latents, shared down, of low rank, adapters",
     .expert_of_slot = {-1, -1, 0, -1, -1},
     .rank_of_slot = {1, 0, 2, 1, 0},
     .projection_of_slot = {0, 0, -1, 0, 0},
     .latent_size = 5,
     .latent_down = true,
     .mix_of = 4,
     .projection_rank = 2},
    {.name = "every kind at once",
     .expert_of_slot = {0, -1, -1, -1, 0, 1, -1},
     .rank_of_slot = {0, 0, 0, 1, 0, 1, 0},
     .constant_of_slot = {-1, 0, -1, -1, -1, -1, -1},
     .projection_of_slot = {-1, -1, 0, 0, -1, -1, -1},
     .latent_size = 1},
    {.name = "annealing at one half",
     .expert_of_slot = {0, 1, 2, 1, 2, 1},
     .rank_of_slot = {2, 2, 2, 2, 2, 2},
     .annealed_slots = {1, 2, 3, 4, 5},
     .beta = 0.5,
     .frozen_experts = {0}},
    {.name = "annealing, one slot of the base not annealed",
     .expert_of_slot = {0, 1, 1, 1, 0},
     .annealed_slots = {1, 3},
     .beta = 0.25},
    {.name = "annealing towards a zero base",
     .expert_of_slot = {0, 1, 1, 2},
     .rank_of_slot = {1, 1, 1, 1},
     .zero_experts = {1},
     .annealed_slots = {1, 2},
     .beta = 0.7},
    {.name = "annealing at one",
     .expert_of_slot = {0, 1, 1, 1},
     .rank_of_slot = {2, 2, 2, 2},
     .annealed_slots = {1, 2, 3},
     .beta = 1},
    {.name = "annealing done",
     .expert_of_slot = {0, 1, 1, 1},
     .rank_of_slot = {2, 2, 2, 2},
     .annealed_slots = {1, 2, 3},
     .beta = 0},
    {.name = "units removed, every width another",
     .expert_of_slot = {0, 1, 2, 3, 4},
     .frozen_experts = {2},
     .width_of_expert = {10, 3, 1, 7, 4}},
    {.name = "adapters wider than their experts",
     .expert_of_slot = {0, 1, 0, 2, 1, 3},
     .rank_of_slot = {2, 3, 2, 2, 0, 0},
     .frozen_experts = {2},
     .width_of_expert = {4, 7, 4, 10},
     .wide_adapters = true},
    {.name = "two widths, shared, adapters, zero, removed, constants, latents",
     .expert_of_slot = {0, 1, 0, 2, 3, 3, -1, -1, -1, 4},
     .rank_of_slot = {2, 2, 2, 0, 2, 0, 0, 0, 1, 0},
     .zero_experts = {3},
     .constant_of_slot = {-1, -1, -1, -1, -1, -1, 0, -1, -1, -1},
     .projection_of_slot = {-1, -1, -1, -1, -1, -1, -1, -1, 0, -1},
     .width_of_expert = {6, 10, 6, 10, 6}},
    {.name = "odd sizes",
     .hidden = 33,
     .width = 17,
     .expert_of_slot = {0, 0, 1, 1, 2},
     .rank_of_slot = {5, 5, 5, 5, 0}},
};

std::vector<int32_t> live_slots(const MoeLayer& layer) {
  std::vector<int32_t> live;
  for (size_t s = 0; s < layer.slots.size(); ++s) {
    if (layer.slots[s].kind != SlotKind::kRemoved) live.push_back(static_cast<int32_t>(s));
  }
  return live;
}

struct Inputs {
  Var x, gates;
  Tensor slots, dy;
};
Inputs make_inputs(const MoeLayer& layer, int64_t tokens, const std::vector<int32_t>& allowed, int64_t top_k,
                   DType dtype) {
  const int64_t hidden = layer.router->value.dim(1);
  return {.x = Tape::variable(random_tensor({tokens, hidden}, dtype, 100)),
          .gates = Tape::variable(random_tensor({tokens, top_k}, dtype, 101, 0.5)),
          .slots = random_slots(tokens, top_k, allowed, 102),
          .dy = random_tensor({tokens, hidden}, dtype, 103)};
}

void expect_equal_to_dense(const MoeLayer& layer, const Inputs& in, double tolerance) {
  const DenseMoe expected(layer, in.x.value, in.slots, in.gates.value, in.dy);
  for (const ParameterPtr& p : layer.parameters()) p->zero_grad();
  Tape tape;
  const Var y = moe_experts(tape, in.x, layer, in.slots, in.gates, {});
  EXPECT_TRUE(close(y.value, expected.y, tolerance)) << "y";
  y.grad->share(in.dy);
  tape.backward();
  EXPECT_TRUE(close(in.x.grad->take(), expected.dx, tolerance)) << "dx";
  EXPECT_TRUE(close(in.gates.grad->take(), expected.dgates, tolerance)) << "dgates";
  for (const ParameterPtr& p : layer.parameters()) {
    if (p == layer.router) continue;
    if (!p->trainable) {
      EXPECT_FALSE(p->grad.defined()) << p->name;
      continue;
    }
    std::vector<double> zeros(static_cast<size_t>(p->value.numel()), 0);
    const auto it = expected.gradients.find(p.get());
    EXPECT_TRUE(close(p->ensure_grad(), it == expected.gradients.end() ? zeros : it->second, tolerance)) << p->name;
  }
}

class Moe : public ::testing::TestWithParam<LayerSpec> {};

TEST_P(Moe, EqualsTheMaterialisedFormInDouble) {
  const MoeLayer layer = make_layer(GetParam(), DType::kF64, DType::kF64, 1);
  const std::vector<int32_t> live = live_slots(layer);
  for (const int64_t tokens : {0, 1, 2, 31}) {
    for (const int64_t top_k : {1, 3}) {
      SCOPED_TRACE(::testing::Message() << tokens << " tokens, top " << top_k);
      expect_equal_to_dense(layer, make_inputs(layer, tokens, live, top_k, DType::kF64), 1e-12);
    }
  }
  // One-expert skew: every token chooses the same slots, the others stay empty.
  expect_equal_to_dense(layer, make_inputs(layer, 19, {live[0], live[1], live[2]}, 3, DType::kF64), 1e-12);
}

TEST_P(Moe, EqualsTheMaterialisedFormInFloat) {
  // Two products deep (D, then F terms), a third in backward, every sum over at most tokens * K rows.
  const double tolerance = 3 * testing::sum_tolerance(DType::kF32, 100);
  for (const DeviceKind device : testing::devices()) {
    const DeviceScope scope(device);
    for (const DType frozen : {DType::kF32, DType::kBF16}) {
      SCOPED_TRACE(::testing::Message() << name_of(device) << ", " << name_of(frozen));
      const MoeLayer layer = make_layer(GetParam(), frozen, DType::kF32, 2);
      expect_equal_to_dense(layer, make_inputs(layer, 29, live_slots(layer), 3, DType::kF32), tolerance);
    }
    const MoeLayer layer = make_layer(GetParam(), DType::kBF16, DType::kBF16, 3);
    expect_equal_to_dense(layer, make_inputs(layer, 29, live_slots(layer), 3, DType::kF32), tolerance);
  }
}

TEST_P(Moe, GradientCheck) {
  const MoeLayer layer = make_layer(GetParam(), DType::kF64, DType::kF64, 4);
  const Inputs in = make_inputs(layer, 5, live_slots(layer), 3, DType::kF64);
  std::vector<ParameterPtr> trained = layer.parameters();
  trained.erase(trained.begin());
  const auto loss = [&](Tape& tape) {
    return dot_loss(tape, moe_experts(tape, in.x, layer, in.slots, in.gates, {}), in.dy);
  };
  const GradCheckReport report = check_gradients(loss, {in.x, in.gates}, trained, 16);
  EXPECT_LT(report.worst, 1e-7) << report.where;
}

TEST_P(Moe, RecomputedIsTheSameBits) {
  const MoeLayer layer = make_layer(GetParam(), DType::kF32, DType::kF32, 5);
  std::vector<std::vector<Tensor>> results;
  for (const bool recompute : {false, true}) {
    const Inputs in = make_inputs(layer, 17, live_slots(layer), 3, DType::kF32);
    for (const ParameterPtr& p : layer.parameters()) p->zero_grad();
    Tape tape;
    const auto f = [&](Tape& t, const std::vector<Var>& v) {
      return std::vector<Var>{moe_experts(t, v[0], layer, in.slots, v[1], {})};
    };
    const Var y = recompute ? tape.checkpoint({in.x, in.gates}, f)[0] : f(tape, {in.x, in.gates})[0];
    y.grad->share(in.dy);
    tape.backward();
    std::vector<Tensor>& all =
        results.emplace_back(std::vector<Tensor>{y.value, in.x.grad->take(), in.gates.grad->take()});
    for (const ParameterPtr& p : layer.parameters()) {
      if (p->trainable) all.push_back(p->ensure_grad().clone());
    }
  }
  for (size_t i = 0; i < results[0].size(); ++i) EXPECT_TRUE(testing::bits_equal(results[0][i], results[1][i])) << i;
}

INSTANTIATE_TEST_SUITE_P(Layers, Moe, ::testing::ValuesIn(kSpecs), [](const auto& info) {
  std::string name;
  for (const char* c = info.param.name; *c != 0; ++c) name += std::isalnum(static_cast<unsigned char>(*c)) ? *c : '_';
  return name;
});

Tensor forward(const MoeLayer& layer, const Inputs& in) {
  Tape tape(false);
  return moe_experts(tape, in.x, layer, in.slots, in.gates, {}).value;
}

TEST(MoeAnnealing, StartsAsTheOriginalLayerAndEndsAsTheSharedOne) {
  LayerSpec spec{.name = "",
                 .expert_of_slot = {0, 1, 1, 1, 2, 2},
                 .rank_of_slot = {2, 2, 2, 2, 2, 2},
                 .annealed_slots = {1, 2, 3, 4, 5},
                 .beta = 1};
  MoeLayer layer = make_layer(spec, DType::kF64, DType::kF64, 6);
  for (const Adapter& a : layer.adapters)
    a.b_gate->value.fill_zero(), a.b_up->value.fill_zero(), a.b_down->value.fill_zero();
  MoeLayer original{.router = layer.router, .slots = {}, .experts = {layer.experts[0]}, .adapters = {}, .annealed = {}};
  for (int32_t s = 0; s < 6; ++s) original.slots.push_back({.expert = s});
  for (const AnnealedSlot& annealed : layer.annealed) original.experts.push_back(annealed.original);
  ASSERT_TRUE(original.is_plain());
  const Inputs in = make_inputs(layer, 23, live_slots(layer), 3, DType::kF64);
  EXPECT_TRUE(close(forward(layer, in), testing::to_doubles(forward(original, in)), 1e-14));
  layer.beta = 1e-9;
  const Tensor almost = forward(layer, in);
  layer.beta = 0;
  const Tensor with_originals_around = forward(layer, in);
  layer.annealed.clear();
  EXPECT_TRUE(testing::bits_equal(with_originals_around, forward(layer, in)));
  EXPECT_TRUE(close(almost, testing::to_doubles(forward(layer, in)), 1e-8));
}

// An expert with zero rows and columns where units were removed computes the same, and takes the bytes the narrow one does not.
TEST(MoeWidths, EqualTheDensifiedExperts) {
  const LayerSpec spec{.name = "", .expert_of_slot = {0, 1, 2, 1}, .width_of_expert = {4, 10, 7}};
  const MoeLayer narrow = make_layer(spec, DType::kF64, DType::kF64, 6);
  MoeLayer dense = make_layer({.name = "", .expert_of_slot = {0, 1, 2, 1}}, DType::kF64, DType::kF64, 6);
  const auto copy_rows = [](const Tensor& from, int64_t first, int64_t count, const Tensor& to, int64_t at) {
    to.slice(at, at + count).copy_from(from.slice(first, first + count));
  };
  for (size_t e = 0; e < 3; ++e) {
    const Tensor &up = dense.experts[e].gate_up->value, &down = dense.experts[e].down->value;
    const int64_t f = spec.width_of_expert[e];
    up.fill_zero(), down.fill_zero();
    copy_rows(narrow.experts[e].gate_up->value, 0, f, up, 0);
    copy_rows(narrow.experts[e].gate_up->value, f, f, up, 10);
    for (int64_t i = 0; i < 12; ++i) {
      for (int64_t j = 0; j < f; ++j) {
        down.data<double>()[i * 10 + j] = narrow.experts[e].down->value.data<double>()[i * f + j];
      }
    }
  }
  for (const int64_t tokens : {1, 2, 40}) {
    const Inputs in = make_inputs(narrow, tokens, {0, 1, 2, 3}, 2, DType::kF64);
    EXPECT_TRUE(close(forward(narrow, in), testing::to_doubles(forward(dense, in)), 1e-12)) << tokens;
  }
  EXPECT_EQ(dense.stored_bytes() - narrow.stored_bytes(), 3 * 12 * (3 * 10 - (4 + 10 + 7)) * 8);
}

TEST(MoeSlots, RemovedSlotsAreNeverChosen) {
  const MoeLayer layer = make_layer({.name = "", .expert_of_slot = {0, -1, 1, -1, 2}}, DType::kF64, DType::kF64, 7);
  const Var x = Tape::variable(random_tensor({37, 12}, DType::kF64, 8));
  Tape tape;
  const Routing r = router(tape, x, layer.router, removed_mask(layer), 2, false);
  for (int64_t i = 0; i < r.slots.numel(); ++i) EXPECT_NE(r.slots.data<int32_t>()[i] % 2, 1);
  EXPECT_NO_THROW(moe_experts(tape, x, layer, r.slots, r.gates, {}));
  EXPECT_FALSE(removed_mask(make_layer(kSpecs[0], DType::kF32, DType::kF32, 9)).defined());
}

// The shared projection of a group runs once per token, however many of its latents the token chose; a token whose slots are all
// constants runs nothing.
TEST(MoeSlots, ATokenOfConstantsAloneIsTheirGatedSum) {
  const MoeLayer layer = make_layer({.name = "", .expert_of_slot = {0, -1, -1}, .constant_of_slot = {-1, 0, 1}},
                                    DType::kF64, DType::kF64, 10);
  const Inputs in = make_inputs(layer, 4, {1, 2}, 2, DType::kF64);
  const Tensor y = forward(layer, in);
  const std::vector<double> c = testing::to_doubles(layer.constants->value), g = testing::to_doubles(in.gates.value);
  for (int64_t t = 0; t < 4; ++t) {
    for (int64_t d = 0; d < 12; ++d) {
      double expected = 0;
      for (int64_t k = 0; k < 2; ++k) {
        const int64_t row = layer.slots[static_cast<size_t>(in.slots.data<int32_t>()[t * 2 + k])].constant;
        expected += g[static_cast<size_t>(t * 2 + k)] * c[static_cast<size_t>(row * 12 + d)];
      }
      EXPECT_NEAR(y.data<double>()[t * 12 + d], expected, 1e-14);
    }
  }
}

// One expert in the banks of two layers: gradients of both add up in the one parameter.
TEST(MoeSlots, AnExpertMayBelongToTwoLayers) {
  MoeLayer a = make_layer({.name = "", .expert_of_slot = {0, 1, 2}}, DType::kF64, DType::kF64, 11);
  MoeLayer b = make_layer({.name = "", .expert_of_slot = {0, 1, 2}}, DType::kF64, DType::kF64, 12);
  b.experts[1] = a.experts[2];
  const Inputs in = make_inputs(a, 7, {0, 1, 2}, 2, DType::kF64);
  const auto loss = [&](Tape& tape) {
    const Var middle = moe_experts(tape, in.x, a, in.slots, in.gates, {});
    return dot_loss(tape, moe_experts(tape, middle, b, in.slots, in.gates, {}), in.dy);
  };
  const GradCheckReport report = check_gradients(loss, {in.x}, {a.experts[2].gate_up, a.experts[2].down}, 16);
  EXPECT_LT(report.worst, 1e-7) << report.where;
}

TEST(MoeMemory, FrozenLayersKeepNothing) {
  const MoeLayer layer =
      make_layer({.name = "", .hidden = 32, .width = 32, .expert_of_slot = {0, 1, 2}, .frozen_experts = {0, 1, 2}},
                 DType::kF32, DType::kF32, 11);
  Inputs in = make_inputs(layer, 64, {0, 1, 2}, 2, DType::kF32);
  in.x.grad = nullptr, in.gates.grad = nullptr;
  Tape tape;
  const int64_t before = memory_use(MemoryCategory::kActivations).live_bytes;
  const Var y = moe_experts(tape, in.x, layer, in.slots, in.gates, {});
  EXPECT_EQ(tape.size(), 0u);
  EXPECT_FALSE(y.needs_grad());
  EXPECT_EQ(memory_use(MemoryCategory::kActivations).live_bytes - before, y.value.bytes());
}

}  // namespace
}  // namespace lightmoe
