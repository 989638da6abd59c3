// Router KD: the routers alone change, towards the original's output, whatever kind of slots a method left; the loss is tau^2 KL.

#include "compress/router_kd.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "compress/recipe.h"
#include "compress/recover.h"
#include "loaders/json.h"
#include "tests/support/compression.h"
#include "tests/support/program.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

namespace fs = std::filesystem;
using testing::CompressionGround;
using testing::fails_with;
using testing::TempDir;

Batch first_batch() {
  DataStream stream(CompressionGround::golden().calibration, {.rows = 2, .length = 24});
  return to_batch(stream.next());
}

Batch all_tokens() {
  const std::vector<Document>& documents = CompressionGround::golden().calibration;
  DataStream stream(documents, {.rows = std::ssize(documents), .length = 40, .shuffle = false});
  return to_batch(stream.next());
}

std::map<std::string, Tensor> values_of(const Olmoe& model) {
  std::map<std::string, Tensor> values;
  for (const ParameterPtr& p : model.parameters()) values[p->name] = p->value.clone();
  return values;
}

// Returns the elements that changed.
int64_t expect_routers_alone_changed(const Olmoe& model, const std::map<std::string, Tensor>& before) {
  for (const auto& [name, value] : values_of(model)) {
    if (name.ends_with("mlp.gate.weight")) continue;
    EXPECT_TRUE(testing::bits_equal(value, before.at(name))) << name;
  }
  int64_t changed = 0;
  for (const Block& block : model.blocks) {
    const Tensor &now = block.moe.router->value, &then = before.at(block.moe.router->name);
    for (int64_t slot = 0; slot < now.dim(0); ++slot) {
      const bool masked = block.moe.slots[static_cast<size_t>(slot)].kind == SlotKind::kRemoved;
      EXPECT_EQ(bool(testing::bits_equal(now.row(slot), then.row(slot))), masked) << slot;
      changed += masked ? 0 : now.dim(1);
    }
  }
  return changed;
}

TEST(RouterKd, TrainsRoutersAloneAfterEveryKindOfMethod) {
  const CompressionGround& ground = CompressionGround::golden();
  for (const char* method : {"reap", "conmoe", "mone", "molae", "lightmoe", "d2-moe", "fisher-l"}) {
    SCOPED_TRACE(method);
    const TempDir where;
    ground.compress(method, .4, where / "out");
    RecoveryOptions options;
    options.router_kd = true;
    Recovery recovery(where / "out", ground.model, 12, options);
    const std::map<std::string, Tensor> before = values_of(recovery.model());
    const Batch batch = all_tokens();
    recovery.trainable().forward_backward(batch, {});
    const double kl = recovery.teacher_kl();
    EXPECT_GT(kl, 0);
    for (const ParameterPtr& p : recovery.model().parameters()) p->zero_grad();
    DataStream data(ground.calibration, {.rows = 4, .length = 40});
    TrainerOptions training;
    training.steps = 12;
    training.optimizer.weight_decay = 0;
    training.schedule = {.kind = ScheduleKind::kConstant, .peak_lr = 1e-3, .total_steps = 12};
    training.progress.quiet = true;
    train(recovery.trainable(), data, training, recovery.hooks(DType::kF32));
    recovery.trainable().forward_backward(batch, {});
    EXPECT_LT(recovery.teacher_kl(), .99 * kl);
    recovery.finish();
    const int64_t changed = expect_routers_alone_changed(recovery.model(), before);
    fs::create_directories(where / "saved");
    recovery.save(where / "saved", DType::kF32, nullptr);
    EXPECT_NEAR(ground.loss(where / "saved"), ground.loss(recovery.model()), 1e-5);
    const CompressionRecord record = read_record(where / "saved");
    EXPECT_EQ(record.trainable_parameters, changed);
    const RecoveryEstimate estimate = estimate_recovery(where / "out", options, DType::kF32, 40, Recompute::kNone);
    EXPECT_EQ(estimate.stored_parameters, record.stored_parameters);
    EXPECT_EQ(estimate.teacher_bytes, model_size(read_config(ground.model)).total() * 4);
  }
}

double kl_at(Recovery& recovery, const Batch& batch) {
  recovery.trainable().forward_backward(batch, {.loss_scale = 1.0 / static_cast<double>(batch.num_labels)});
  return recovery.teacher_kl();
}

// The gradient is that of tau^2 KL: along itself by central differences, and (tau^2 KL of far temperatures being the squared distance of
// centred logits) as long at tau 64 as at tau 128.
TEST(RouterKd, TheGradientIsOfTauSquaredKl) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  ground.compress("hc-smoe", .5, where / "out");
  const Batch batch = first_batch();
  std::map<double, double> lengths;
  for (const double tau : {1., 3., 64., 128.}) {
    RecoveryOptions options;
    options.router_kd = true, options.distill_temperature = tau;
    Recovery recovery(where / "out", ground.model, 1, options);
    const ParameterPtr router =
        recovery.model().blocks[1].moe.router;  // choices of the last layer change no later ones
    for (const ParameterPtr& p : recovery.model().parameters()) p->zero_grad();
    kl_at(recovery, batch);
    const Tensor gradient = router->grad.clone(), start = router->value.clone();
    double squares = 0;
    for (int64_t i = 0; i < gradient.numel(); ++i) squares += std::pow(double{gradient.data<float>()[i]}, 2);
    lengths[tau] = std::sqrt(squares);
    if (tau > 3) continue;
    // A step of 1e-3 along the unit gradient: cubic terms and f32 logits stay below a per cent of the difference.
    const double h = 1e-3;
    double slope = 0;
    for (const double sign : {1., -1.}) {
      for (int64_t i = 0; i < start.numel(); ++i) {
        router->value.data<float>()[i] =
            static_cast<float>(start.data<float>()[i] + sign * h * gradient.data<float>()[i] / lengths[tau]);
      }
      slope += sign * tau * tau * kl_at(recovery, batch) / (2 * h);
    }
    EXPECT_NEAR(slope, lengths[tau], .02 * lengths[tau]) << tau;
  }
  EXPECT_NEAR(lengths[64] / lengths[128], 1, .02);
}

TEST(RouterKd, IsNothingForTheOriginal) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  ground.compress("reap", 0, where / "out");
  RecoveryOptions options;
  options.router_kd = true;
  Recovery recovery(where / "out", ground.model, 1, options);
  EXPECT_NEAR(kl_at(recovery, first_batch()), 0, 1e-7);
}

TEST(RouterKd, RefusesWhatItCannotDo) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  ground.compress("lightmoe", .4, where / "out");
  RecoveryOptions options;
  options.router_kd = true;
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"not the model that was compressed"},
                         [&] { Recovery(where / "out", "tests/golden/plain", 1, options); }));
  options.annealing = Annealing{.eps = .2};
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--router-kd", "--anneal 0.2"},
                         [&] { Recovery(where / "out", ground.model, 1, options); }));
  options.annealing.reset(), options.distill = .5;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--router-kd", "--distill 0.5"},
                         [&] { Recovery(where / "out", ground.model, 1, options); }));
}

TEST(RouterKd, AVerbAndARecipe) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  ground.compress("reap", .25, where / "out");
  const testing::ProgramResult run = testing::run_lightmoe(
      {"recover", where / "out", "--base", ground.model, "--tokens", ground.model / "golden.safetensors", "--steps",
       "3", "--length", "40", "--batch-rows", "1", "--router-kd", "--distill-temperature", "2", "-o", where / "kd"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const Json recovery = read_json_file((where / "kd" / kRecordFile).string())["recovery"];
  EXPECT_EQ(recovery["router_kd"]["temperature"], 2);
  EXPECT_GT(recovery["router_kd"]["kl"].get<double>(), 0);
  testing::put_file(where / "recipe.toml", fmt::format(R"([recipe]
model = "{}"
output = "{}"
methods = ["kd", "original"]
[train]
router_kd = true
[method.kd]
method = "mone"
[[task]]
name = "t"
train = "a"
test = "b"
)",
                                                       ground.model.string(), (where / "runs").string()));
  const Recipe recipe = read_recipe(where / "recipe.toml", false);
  EXPECT_TRUE(trains(recipe.methods[0]));  // mone trains constants and the like; here its routers
  EXPECT_FALSE(trains(recipe.methods[1]));
  EXPECT_TRUE(recipe.methods[0].training.router_kd);
}

}  // namespace
}  // namespace lightmoe
