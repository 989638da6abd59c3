// MC-SMoE: the decomposition by hand, experts with adapters wider than they are, progressive pruning while recovery trains.

#include <gtest/gtest.h>

#include "compress/decomposition.h"
#include "compress/linear_algebra.h"
#include "compress/recover.h"
#include "loaders/json.h"
#include "model/verify.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"
#include "tests/support/tiny_experts.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;
using testing::TempDir;
using testing::TinyModel;

// Unit 0 of every matrix is along (1,0,0,0) with length 3, unit 1 along (0,1,0,0) with length 1: rank one takes unit 0, and unit 1 is
// what S has to say, so it comes first.
TEST(Decomposition, ByHand) {
  const auto weights = [](int64_t, int64_t, ExpertMatrix matrix, int64_t row, int64_t column) {
    const int64_t unit = matrix == ExpertMatrix::kDown ? column : row,
                  other = matrix == ExpertMatrix::kDown ? row : column;
    return unit == other ? (unit == 0 ? 3.f : 1.f) : 0.f;
  };
  TinyModel tiny(1, weights);
  const Decomposition d = decompose(tiny.input(), 0, {.experts = {2}, .weights = {1}}, 1);
  EXPECT_EQ(d.order, (std::vector<int32_t>{1, 0}));
  EXPECT_TRUE(testing::close(d.sparse.gate, {0, 1, 0, 0, 0, 0, 0, 0}, 1e-14));
  EXPECT_TRUE(testing::close(d.sparse.down, {0, 0, 1, 0, 0, 0, 0, 0}, 1e-14));
  // Unit 1 of S and the rank one are the expert, its units exchanged.
  EXPECT_TRUE(testing::close(product(d.up.b, false, d.up.a, false), {0, 0, 0, 0, 3, 0, 0, 0}, 1e-14));
  EXPECT_TRUE(testing::close(product(d.down.b, false, d.down.a, false), {0, 3, 0, 0, 0, 0, 0, 0}, 1e-14));
  EXPECT_TRUE(testing::close(first_units(d.sparse.gate, ExpertMatrix::kGate, 1), {0, 1, 0, 0}, 1e-14));
  EXPECT_TRUE(testing::close(first_units(d.sparse.down, ExpertMatrix::kDown, 1), {0, 1, 0, 0}, 1e-14));
}

// Kept units are the merged expert exactly, whatever the rank; the others are what the low-rank part says.
TEST(Decomposition, KeptUnitsAreExact) {
  const CompressionGround& ground = CompressionGround::golden();
  const OlmoeConfig config = read_config(ground.model);
  const Checkpoint checkpoint(ground.model);
  const ExpertSource experts(checkpoint, config);
  const MethodOptions options;
  const MethodInput input{.config = config, .statistics = ground.statistics, .options = options, .experts = &experts};
  const BankEntry group{.experts = {3, 8, 21}, .weights = {.5, .3, .2}};
  const Decomposition d = decompose(input, 0, group, 3);
  const ExpertMatrices whole = with_units(merged_expert(input, 0, group, {.align = true}), d.order);
  const auto sum = [](const Tensor& s, const LowRank& part) {
    std::vector<double> all = testing::to_doubles(product(part.b, false, part.a, false));
    for (size_t i = 0; i < all.size(); ++i) all[i] += s.data<double>()[i];
    return all;
  };
  EXPECT_TRUE(testing::close(whole.gate, sum(d.sparse.gate, d.gate), 1e-12));
  EXPECT_TRUE(testing::close(whole.up, sum(d.sparse.up, d.up), 1e-12));
  EXPECT_TRUE(testing::close(whole.down, sum(d.sparse.down, d.down), 1e-12));
}

TEST(McSmoe, SizesAreMet) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  for (const double ratio : {.25, .5, .7}) {
    const CompressionRecord record = ground.compress("mc-smoe", ratio, where / "out");
    const ModelSize size = model_size(read_config(ground.model));
    const auto allowed = static_cast<double>(size.total()) - ratio * static_cast<double>(size.all_experts());
    EXPECT_LE(static_cast<double>(record.stored_parameters), allowed);
    EXPECT_GT(static_cast<double>(record.stored_parameters),
              allowed - static_cast<double>(size.layers * size.slots * 3 * size.hidden));  // less than a unit an expert
    const LayerShape& shape = record.plan.layers[0].shape;
    EXPECT_TRUE(shape.wide_adapters);
    EXPECT_LT(shape.widths[0], size.width);
    EXPECT_EQ(shape.width_of_adapter(0, size.width), size.width);
    EXPECT_TRUE(record.plan.units_go_in_recovery);
  }
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"impossible for mc-smoe", "nearest possible"},
                                  [&] { ground.compress("mc-smoe", .99, where / "out"); }));
}

TEST(McSmoe, IdentityAtRatioZero) { testing::expect_identity_at_zero("mc-smoe"); }
TEST(McSmoe, BytesReallyFall) { testing::expect_bytes_saved("mc-smoe", .5); }
TEST(McSmoe, ExportsTheSameFunction) { testing::expect_export_is_the_same("mc-smoe", .5); }
TEST(McSmoe, DemoLoss) { testing::expect_useful_on_demo("mc-smoe"); }

TrainerOptions steps(int64_t count) {
  TrainerOptions options;
  options.steps = count;
  options.schedule = {.kind = ScheduleKind::kConstant, .peak_lr = 1e-3, .total_steps = count};
  options.progress.quiet = true;
  return options;
}

int64_t silent_units(const Expert& expert) {
  int64_t count = 0;
  const int64_t f = expert.down->value.dim(1);
  for (int64_t u = 0; u < f; ++u) {
    double sum = 0;
    for (const double v : testing::to_doubles(expert.gate_up->value.row(u))) sum += std::abs(v);
    for (int64_t k = 0; k < expert.down->value.dim(0); ++k)
      sum += std::abs(static_cast<double>(expert.down->value.data<float>()[k * f + u]));
    count += sum == 0;
  }
  return count;
}

// The first step is M-SMoE's merge; units go along the curve; in the end the model is as small as promised and the same function.
TEST(McSmoe, UnitsGoWhileRecoveryTrains) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const CompressionRecord record = ground.compress("mc-smoe", .5, where / "out");
  const int64_t full = read_config(ground.model).intermediate_size, last = record.plan.layers[0].shape.widths[0];
  Recovery recovery(where / "out", ground.model, 8, {});
  const MoeLayer& moe = recovery.model().blocks[0].moe;
  EXPECT_EQ(moe.experts[0].down->value.dim(1), full);
  int64_t trainable = 0;
  for (const ParameterPtr& p : recovery.model().parameters()) trainable += p->trainable ? p->value.numel() : 0;
  EXPECT_EQ(trainable, record.trainable_parameters);
  const int64_t in_training = recovery.model().stored_bytes();
  {  // S + U V is the merged expert
    const Checkpoint checkpoint(ground.model);
    const OlmoeConfig config = read_config(ground.model);
    const ExpertSource experts(checkpoint, config);
    const MethodOptions options;
    const MethodInput input{.config = config, .statistics = ground.statistics, .options = options, .experts = &experts};
    const BankEntry& group = record.plan.layers[0].bank[0];
    const Decomposition d = decompose(input, 0, group, record.plan.layers[0].shape.adapter_rank[0]);
    const ExpertMatrices whole = with_units(merged_expert(input, 0, group, {.align = true}), d.order);
    const Adapter& adapter = moe.adapters[static_cast<size_t>(
        moe.slots[static_cast<size_t>(record.plan.layers[0].adapter_slot[0])].adapter)];
    std::vector<double> made = testing::to_doubles(
        product(adapter.b_down->value.to(DType::kF64), false, adapter.a_down->value.to(DType::kF64), false));
    for (size_t i = 0; i < made.size(); ++i) made[i] += testing::to_doubles(moe.experts[0].down->value)[i];
    EXPECT_TRUE(testing::close(whole.down, made, 1e-6, 1e-6));
  }
  DataStream data(ground.calibration, {.rows = 1, .length = 40});
  TrainerHooks hooks = recovery.hooks(DType::kF32);
  std::vector<int64_t> silent;
  const auto after = hooks.after_step;
  hooks.after_step = [&](const StepStats& stats) {
    after(stats);
    silent.push_back(silent_units(moe.experts[0]));
  };
  const double before = ground.loss(recovery.model());
  train(recovery.trainable(), data, steps(8), hooks);
  // F - k(t): half is 4 steps, k(1) = last + round((F - last) 27/64), ..
  for (size_t t = 1; t <= silent.size(); ++t) {
    const double left = 1 - std::min(1.0, static_cast<double>(t) / 4);
    EXPECT_EQ(silent[t - 1], full - last - std::llround(static_cast<double>(full - last) * left * left * left)) << t;
  }
  const double masked = ground.loss(recovery.model());
  EXPECT_LT(masked, before);
  recovery.finish();
  EXPECT_EQ(moe.experts[0].down->value.dim(1), last);
  EXPECT_NEAR(ground.loss(recovery.model()), masked, 1e-5);  // zero units went, the others moved
  std::filesystem::create_directories(where / "saved");
  recovery.save(where / "saved", DType::kF32, nullptr);
  EXPECT_EQ(Checkpoint(where / "saved").total_bytes(), record.stored_bytes);
  const RecoveryEstimate estimate = estimate_recovery(where / "out", {}, DType::kF32, 40, Recompute::kNone);
  EXPECT_EQ(estimate.stored_bytes, record.stored_bytes);
  EXPECT_EQ(estimate.training.fixed.weight_bytes, in_training);
  EXPECT_TRUE(verify_model(where / "saved").ok());
  EXPECT_NEAR(ground.loss(where / "saved"), masked, 1e-5);
}

// Importance by hand: of two units the one whose weights and gradients are larger stays.
TEST(McSmoe, StateComesBack) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const CompressionRecord record = ground.compress("mc-smoe", .5, where / "out");
  const auto a = load_model(where / "out", DType::kF32), b = load_model(where / "out", DType::kF32);
  UnitPruner pruner(*a, record, ground.model, 10), resumed(*b, record, ground.model, 10);
  Expert& expert = a->blocks[0].moe.experts[0];
  const int64_t f = expert.down->value.dim(1);
  for (const ParameterPtr& p : {expert.gate_up, expert.down}) {
    p->ensure_grad().fill_zero();
    for (int64_t i = 0; i < p->value.numel(); ++i) p->value.data<float>()[i] = 1;
  }
  expert.down->ensure_grad().data<float>()[5] = 2;  // unit 5 of the first row
  expert.down->ensure_grad().data<float>()[f + 3] = -1;
  pruner.after_step(1);
  const std::vector<double> importance = pruner.state()["unit_importance"][0].get<std::vector<double>>();
  EXPECT_NEAR(importance[5], .15 * 2, 1e-12);
  EXPECT_NEAR(importance[3], .15, 1e-12);
  EXPECT_EQ(importance[4], 0);
  pruner.after_step(5);  // the end: the most important stay, ties the lower unit
  EXPECT_EQ(silent_units(expert), f - record.plan.layers[0].shape.widths[0]);
  EXPECT_EQ(expert.down->value.data<float>()[5], 1);
  EXPECT_EQ(expert.down->value.data<float>()[f - 1], 0);
  resumed.restore(parse_json(pruner.state().dump(), "json"));
  EXPECT_EQ(resumed.state(), pruner.state());
  EXPECT_TRUE(testing::fails_with(ErrorKind::kResume, {"no state"}, [&] { resumed.restore(Json(nullptr)); }));
}

}  // namespace
}  // namespace lightmoe
