// Pruning while recovery trains: windows by hand, checkpoints, a whole recovery.

#include "compress/task_pruning.h"

#include <gtest/gtest.h>

#include "compress/recover.h"
#include "compress/weights.h"
#include "loaders/json.h"
#include "model/verify.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;
using testing::TempDir;

std::unique_ptr<Olmoe> five_experts() {
  OlmoeConfig config;
  config.vocab_size = 11, config.hidden_size = 4, config.intermediate_size = 2, config.num_layers = 1;
  config.num_heads = config.num_kv_heads = 1, config.num_experts = 5, config.num_experts_per_token = 2;
  return random_model(config, DType::kF32, 1);
}

// One token that gives these gates to slots 0..4.
void show(const TaskPruner& pruner, const std::vector<float>& gates) {
  const auto count = std::ssize(gates);
  pruner.observer()->on_router({.layer = 0,
                                .slots = Tensor::from(std::vector<int32_t>{0, 1, 2, 3, 4}, {1, count}),
                                .gates = Tensor::from(gates, {1, count})});
}
std::vector<int32_t> removed(const Olmoe& model) {
  std::vector<int32_t> gone;
  for (size_t s = 0; s < 5; ++s) {
    if (model.blocks[0].moe.slots[s].kind == SlotKind::kRemoved) gone.push_back(static_cast<int32_t>(s));
  }
  return gone;
}

// 40 steps: half is 20, a window 2 steps. Five experts, two to keep, beta .5.
TEST(TaskPruning, WindowsByHand) {
  const auto model = five_experts();
  TaskPruner pruner(*model, 2, 40);
  show(pruner, {.3F, .3F, .2F, .15F, .05F});
  pruner.before_step(1);
  pruner.before_step(2);
  EXPECT_TRUE(removed(*model).empty());  // no window is over
  pruner.before_step(3);                 // .5 / 5 of 1 = .1: expert 4
  EXPECT_EQ(removed(*model), (std::vector<int32_t>{4}));
  show(pruner, {.4F, .4F, .15F, .05F,
                9});  // a masked slot is not counted: .5 / 4 of 1 = .125: expert 3, the window before is forgotten
  pruner.before_step(5);
  EXPECT_EQ(removed(*model), (std::vector<int32_t>{3, 4}));
  show(pruner, {.1F, .6F, .3F, 0, 0});  // .5 / 3 = .167: expert 0, then two are left and no more goes
  pruner.before_step(7);
  show(pruner, {0, 1, .01F, 0, 0});
  pruner.before_step(9);
  EXPECT_EQ(removed(*model), (std::vector<int32_t>{0, 3, 4}));
  const Plan plan = pruner.finish();
  EXPECT_EQ(plan.layers[0].replaced, (std::vector<int32_t>{0, 3, 4}));
  EXPECT_EQ(model->blocks[0].moe.experts.size(), 2u);
  EXPECT_EQ(model->blocks[0].moe.slots[2].expert, 1);
}

TEST(TaskPruning, HalfOfTrainingForcesTheBudget) {
  const auto model = five_experts();
  TaskPruner pruner(*model, 2, 40);
  for (int64_t step = 2; step <= 20; ++step) pruner.before_step(step);
  EXPECT_TRUE(removed(*model).empty());       // no mass, no share
  show(pruner, {.21F, .2F, .2F, .19F, .2F});  // even: no window would drop any
  pruner.before_step(21);
  EXPECT_EQ(removed(*model), (std::vector<int32_t>{1, 2, 3}));  // the lightest, ties the lower slot first
  show(pruner, {0, 0, 0, 0, 1});
  pruner.before_step(23);
  EXPECT_EQ(removed(*model).size(), 3u);
}

TEST(TaskPruning, StateComesBack) {
  const auto model = five_experts(), other = five_experts();
  TaskPruner pruner(*model, 2, 40), resumed(*other, 2, 40);
  show(pruner, {.3F, .3F, .2F, .15F, .05F});
  pruner.before_step(3);
  show(pruner, {.4F, .4F, .15F, .05F, 0});
  resumed.restore(parse_json(pruner.state().dump(), "json"));
  EXPECT_EQ(removed(*other), (std::vector<int32_t>{4}));
  resumed.before_step(5);
  pruner.before_step(5);
  EXPECT_EQ(removed(*other), removed(*model));
  EXPECT_EQ(removed(*other), (std::vector<int32_t>{3, 4}));
  EXPECT_TRUE(
      testing::fails_with(ErrorKind::kResume, {"no state of the pruning"}, [&] { resumed.restore(Json(nullptr)); }));
}

TEST(TaskPruning, RecoveryCutsTheModelDown) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const CompressionRecord record = ground.compress("task-specific", .5, where / "out");
  EXPECT_EQ(record.stored_bytes, record.original_bytes);  // nothing goes beforehand
  EXPECT_EQ(record.plan.experts_to_keep, 32);
  Recovery recovery(where / "out", ground.model, 8, {});
  DataStream data(ground.calibration, {.rows = 1, .length = 40});
  TrainerOptions options;
  options.steps = 8;
  options.schedule = {.kind = ScheduleKind::kConstant, .peak_lr = 3e-3, .total_steps = 8};
  options.progress.quiet = true;
  const double before = ground.loss(recovery.model());
  train(recovery.trainable(), data, options, recovery.hooks(DType::kF32));
  recovery.finish();
  EXPECT_LT(ground.loss(recovery.model()), before);
  std::filesystem::create_directories(where / "saved");
  recovery.save(where / "saved", DType::kF32, nullptr);
  const int64_t bytes = Checkpoint(where / "saved").total_bytes();
  EXPECT_EQ(bytes, estimate_recovery(where / "out", {}, DType::kF32, 40, Recompute::kNone).stored_bytes);
  EXPECT_EQ(record.original_bytes - bytes, model_size(read_config(ground.model)).all_experts() * 4 / 2);
  EXPECT_TRUE(verify_model(where / "saved").ok());
  EXPECT_NEAR(ground.loss(where / "saved"), ground.loss(recovery.model()), 1e-5);
  for (const LayerPlan& layer : read_record(where / "saved").plan.layers) EXPECT_EQ(layer.bank.size(), 32u);
}

// With the entropy penalty routers train and become surer; without it they stay frozen.
TEST(SeerEntropy, RecoveryMakesRoutersSurer) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  ground.compress("seer", .25, where / "out");
  const auto entropies = [&](double coef) {
    Recovery recovery(where / "out", ground.model, 12, {.train_routers = coef > 0});
    EXPECT_EQ(recovery.model().blocks[0].moe.router->trainable, coef > 0);
    DataStream data(ground.calibration, {.rows = 1, .length = 40});
    TrainerOptions options;
    options.steps = 12;
    options.entropy_coef = coef;
    options.schedule = {.kind = ScheduleKind::kConstant, .peak_lr = 1e-2, .total_steps = 12};
    options.progress.quiet = true;
    train(recovery.trainable(), data, options, recovery.hooks(DType::kF32));
    const Document& document = ground.calibration.front();
    const Batch batch = make_batch(document.ids, 1, static_cast<int64_t>(document.ids.size()), document.ids);
    return recovery.model().forward_backward(batch, {.entropy_coef = 1}).entropy;
  };
  const double without = entropies(0), with = entropies(.5);
  EXPECT_LT(with, without - .1);
}

TEST(TaskPruning, DemoLoss) {
  const CompressionGround& ground = CompressionGround::demo();
  const TempDir where;
  ground.compress("task-specific", .25, where / "out");
  Recovery recovery(where / "out", ground.model, 40, {});
  DataStream data(ground.calibration, {.rows = 8, .length = 64});
  TrainerOptions options;
  options.steps = 40;
  options.schedule = {.kind = ScheduleKind::kConstant, .peak_lr = 1e-3, .total_steps = 40};
  options.progress.quiet = true;
  train(recovery.trainable(), data, options, recovery.hooks(DType::kF32));
  recovery.finish();
  const double original = ground.loss(ground.model), loss = ground.loss(recovery.model());
  fmt::print("             task-specific, 40 steps, 25 % of the experts removed: loss {:.3f} (original {:.3f})\n", loss,
             original);
  EXPECT_LT(loss, original + .5);
}

}  // namespace
}  // namespace lightmoe
