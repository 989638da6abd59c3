// Recovery on a golden model: the first step is the original model, the originals leave memory, training resumes bit for bit, and
// what is written has the size that was promised.

#include "compress/recover.h"

#include <gtest/gtest.h>

#include <cmath>

#include "compress/calibrate.h"
#include "compress/compressor.h"
#include "compress/weights.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

namespace fs = std::filesystem;
using testing::TempDir;

const fs::path kModel = "tests/golden/e64k8";

std::vector<Document> documents() { return documents_from_tokens(kModel / "golden.safetensors", 131); }
DataStream stream() { return DataStream(documents(), {.rows = 1, .length = 40}); }

fs::path compressed(const TempDir& where, const std::string& method, double ratio = .5,
                    AdapterInit init = AdapterInit::kGaussian) {
  CompressJob job{.model = kModel, .output = where.path() / (method + name_of(init)), .method = method};
  job.options.budget.value = ratio;
  job.options.rank = 2;
  job.options.adapter_init = init;
  job.statistics = where.path() / "statistics.safetensors";
  if (!fs::exists(job.statistics)) {
    const auto model = load_model(kModel, DType::kF32);
    const CalibrateOptions options;
    save_statistics(
        calibrate(*model, calibration_set(documents(), options), model_fingerprint(Checkpoint(kModel)), options),
        job.statistics);
  }
  compress_model(job);
  return job.output;
}

double loss_of(Olmoe& model) {
  DataStream data = stream();
  const TrainLosses losses = model.forward_backward(to_batch(data.next()), {});
  return losses.ce_sum / static_cast<double>(losses.labels);
}

TrainerOptions training(int64_t steps) {
  TrainerOptions o;
  o.steps = steps;
  o.schedule = {.kind = ScheduleKind::kConstant, .peak_lr = 3e-3, .total_steps = steps};
  o.optimizer.weight_decay = 0;
  o.progress.quiet = true;
  return o;
}

TEST(Annealing, ScheduleEdges) {
  const Annealing linear{.eps = .2};
  EXPECT_EQ(linear.beta(0, 100), 1);
  EXPECT_DOUBLE_EQ(linear.beta(5, 100), .75);
  EXPECT_GT(linear.beta(19, 100), 0);
  EXPECT_EQ(linear.beta(20, 100), 0);
  EXPECT_EQ(linear.beta(99, 100), 0);
  EXPECT_EQ((Annealing{.eps = 0}.beta(0, 100)), 0);
  EXPECT_EQ((Annealing{.eps = 1}.beta(99, 100)), .01 + (1 - .99 - .01));
  EXPECT_EQ((Annealing{.eps = .004}.beta(0, 100)), 1);  // shorter than a step: the first one is still the original
  EXPECT_EQ((Annealing{.eps = .004}.beta(1, 100)), 0);
  for (const double gamma : {1., 3., 5.}) {
    const Annealing exponential{.eps = .5, .shape = AnnealShape::kExponential, .gamma = gamma};
    EXPECT_EQ(exponential.beta(0, 10), 1);
    EXPECT_NEAR(exponential.beta(1, 10), (std::exp(-gamma * .2) - std::exp(-gamma)) / (1 - std::exp(-gamma)), 1e-15);
    EXPECT_EQ(exponential.beta(5, 10), 0);
  }
  EXPECT_NEAR((Annealing{.eps = 1, .shape = AnnealShape::kExponential, .gamma = 1e-6}.beta(3, 10)), .7, 1e-6);
  EXPECT_THROW((Annealing{.eps = 1.1}.check_valid()), Error);
  EXPECT_THROW((Annealing{.shape = AnnealShape::kExponential, .gamma = 0}.check_valid()), Error);
  EXPECT_THROW(parse_anneal_shape("cosine"), Error);
}

TEST(Recover, TheFirstStepIsTheOriginalModel) {
  const TempDir where;
  const auto original = load_model(kModel, DType::kF32);
  const double expected = loss_of(*original);
  for (const AdapterInit init : {AdapterInit::kGaussian, AdapterInit::kSvd}) {
    const fs::path directory = compressed(where, "lightmoe", .5, init);
    Recovery recovery(directory, kModel, 10, {});
    const TrainerHooks hooks = recovery.hooks(DType::kF32);
    hooks.before_step(1);
    // Same products in another order of adding: a few roundings of f32.
    EXPECT_NEAR(loss_of(recovery.model()), expected, 1e-6 * expected) << name_of(init);
    hooks.before_step(3);  // beta 0 from step 3 of 10 on, at eps .2
    EXPECT_EQ(recovery.original_bytes(), 0);
    const auto direct = load_model(directory, DType::kF32);
    EXPECT_NEAR(loss_of(recovery.model()), loss_of(*direct), 1e-6 * expected) << name_of(init);
    EXPECT_GT(std::abs(loss_of(*direct) - expected), 1e-4 * expected);  // there is a jump to avoid
  }
}

TEST(Recover, OriginalsLeaveMemoryAtBetaZero) {
  const TempDir where;
  const fs::path directory = compressed(where, "lightmoe");
  std::string said;
  Recovery recovery(directory, kModel, 10, {.say = [&](const std::string& line) { said += line + "\n"; }});
  const auto live = [] { return memory_use(MemoryCategory::kWeights).live_bytes; };
  const int64_t without = live();
  const TrainerHooks hooks = recovery.hooks(DType::kF32);
  hooks.before_step(1);
  const int64_t expert = 3 * 64 * 16 * 4;
  EXPECT_EQ(recovery.original_bytes(), recovery.record().plan.replaced() * expert);
  EXPECT_EQ(live(), without + recovery.original_bytes());
  hooks.before_step(2);
  EXPECT_EQ(recovery.model().blocks[0].moe.beta, .5);
  hooks.before_step(3);
  EXPECT_EQ(live(), without);
  EXPECT_EQ(recovery.model().blocks[0].moe.beta, 0);
  EXPECT_NE(said.find("originals released"), std::string::npos) << said;
}

TEST(Recover, TrainsBasesAndAdaptersAlone) {
  const TempDir where;
  Recovery recovery(compressed(where, "lightmoe"), kModel, 4, {});
  int64_t trainable = 0;
  for (const ParameterPtr& p : recovery.model().parameters()) trainable += p->trainable ? p->value.numel() : 0;
  EXPECT_EQ(trainable, recovery.record().trainable_parameters);
  EXPECT_EQ(recovery.record().trainable_parameters, 2 * (3 * 3072 + 64 * 2 * 240));
  const Tensor router = recovery.model().blocks[0].moe.router->value.clone(),
               kept = recovery.model().blocks[1].moe.experts[0].down->value.clone();
  const auto base_index = static_cast<size_t>(recovery.record().plan.layers[1].bases[0]);
  const Tensor base = recovery.model().blocks[1].moe.experts[base_index].down->value.clone();
  DataStream data = stream();
  TrainableOlmoe trainable_model(recovery.model());
  const double before = loss_of(recovery.model());
  const TrainResult result = train(trainable_model, data, training(4), recovery.hooks(DType::kF32));
  EXPECT_LT(result.loss, before);
  EXPECT_TRUE(testing::bits_equal(recovery.model().blocks[0].moe.router->value, router));
  EXPECT_TRUE(testing::bits_equal(recovery.model().blocks[1].moe.experts[0].down->value, kept));
  EXPECT_FALSE(testing::bits_equal(recovery.model().blocks[1].moe.experts[base_index].down->value, base));
}

Tensor logits_of(const Olmoe& model) {
  DataStream data = stream();
  return model.logits(model.forward(to_batch(data.next()), {}), {});
}

// Written, loaded again: the same function, the promised size, adapters on replaced slots only.
TEST(Recover, MergingKeepsTheFunction) {
  const TempDir where;
  for (const char* method : {"lightmoe", "replace-none", "lora"}) {
    const fs::path directory = compressed(where, method);
    Recovery recovery(directory, kModel, 3, {});
    DataStream data = stream();
    TrainableOlmoe trainable(recovery.model());
    train(trainable, data, training(3), recovery.hooks(DType::kF32));
    const Tensor before = logits_of(recovery.model());
    recovery.finish();
    recovery.finish();  // once only
    EXPECT_TRUE(testing::close(logits_of(recovery.model()), testing::to_doubles(before), 1e-5)) << method;
    const fs::path saved = where.path() / (std::string(method) + "-out");
    fs::create_directories(saved);
    recovery.save(saved, DType::kF32, Json{{"steps", 3}});
    EXPECT_TRUE(testing::close(logits_of(*load_model(saved, DType::kF32)), testing::to_doubles(before), 1e-5))
        << method;
    const RecoveryEstimate estimate = estimate_recovery(directory, {}, DType::kF32, 40, Recompute::kNone);
    EXPECT_EQ(Checkpoint(saved).total_bytes(), estimate.stored_bytes) << method;
    const CompressionRecord record = read_record(saved);
    EXPECT_EQ(record.stored_parameters, estimate.stored_parameters);
    EXPECT_EQ(record.plan.layers[0].adapter_slot.size(), record.plan.layers[0].replaced.size());
    EXPECT_EQ(read_config(saved).lightmoe_json.empty(), std::string(method) == "lora");
  }
}

TEST(Recover, UnmergedAdaptersStayOnEverySlot) {
  const TempDir where;
  const fs::path directory = compressed(where, "lightmoe");
  Recovery recovery(directory, kModel, 2, {.merge = false});
  recovery.finish();
  const fs::path saved = where.path() / "out";
  fs::create_directories(saved);
  recovery.save(saved, DType::kF32, nullptr);
  const auto model = load_model(saved, DType::kF32);
  EXPECT_EQ(model->blocks[0].moe.adapters.size(), 64u);
  const RecoveryEstimate estimate = estimate_recovery(directory, {.merge = false}, DType::kF32, 40, Recompute::kNone);
  EXPECT_EQ(Checkpoint(saved).total_bytes(), estimate.stored_bytes);
  EXPECT_EQ(read_record(saved).plan.layers[1].adapter_slot.size(), 64u);
}

// Interrupted after step 3 of 6 (once while annealing, once after) and continued: the same bits as in one go.
TEST(Recover, ResumesBitForBit) {
  const TempDir where;
  for (const double eps : {.9, .2}) {
    for (const AdapterInit init : {AdapterInit::kGaussian, AdapterInit::kSvd}) {
      const fs::path checkpoints = where.path() / fmt::format("checkpoints-{}-{}", eps, name_of(init));
      const fs::path directory = where.path() / (std::string("lightmoe") + name_of(init));
      if (!fs::exists(directory)) compressed(where, "lightmoe", .5, init);
      const auto go = [&](int64_t stop_after, const std::string& resume) {
        auto recovery =
            std::make_unique<Recovery>(directory, kModel, 6, RecoveryOptions{.annealing = Annealing{.eps = eps}});
        TrainerOptions o = training(6);
        o.checkpoint = {.directory = checkpoints, .save_every = 3, .keep = 5, .resume = resume};
        o.fingerprint = recovery->fingerprint();
        TrainerHooks hooks = recovery->hooks(DType::kF32);
        if (stop_after > 0) {
          hooks.after_step = [stop_after](const StepStats& s) {
            if (s.step == stop_after + 1) throw Error(ErrorKind::kInternal, "stop here");
          };
        }
        DataStream data = stream();
        TrainableOlmoe trainable(recovery->model());
        try {
          train(trainable, data, o, hooks);
        } catch (const Error& error) {
          EXPECT_STREQ(error.what(), "stop here");
        }
        return recovery;
      };
      const auto whole = go(0, "");
      fs::remove_all(checkpoints);
      go(3, "");
      const auto continued = go(0, "auto");
      const auto a = whole->model().parameters(), b = continued->model().parameters();
      ASSERT_EQ(a.size(), b.size());
      for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(testing::bits_equal(a[i]->value, b[i]->value)) << a[i]->name;
    }
  }
}

TEST(Recover, EstimateIsWhatTrainingTakes) {
  const TempDir where;
  const fs::path directory = compressed(where, "lightmoe");
  const RecoveryEstimate estimate = estimate_recovery(directory, {}, DType::kF32, 40, Recompute::kNone);
  const int64_t others = memory_use(MemoryCategory::kWeights).live_bytes;
  Recovery recovery(directory, kModel, 2, {.annealing = Annealing{.eps = 1}});
  EXPECT_EQ(memory_use(MemoryCategory::kWeights).live_bytes - others, estimate.training.fixed.weight_bytes);
  DataStream data = stream();
  TrainableOlmoe trainable(recovery.model());
  reset_peak_memory();
  const int64_t gradients = memory_use(MemoryCategory::kGradients).live_bytes,
                moments = memory_use(MemoryCategory::kOptimizer).live_bytes;
  train(trainable, data, training(2), recovery.hooks(DType::kF32));
  EXPECT_EQ(memory_use(MemoryCategory::kGradients).peak_bytes - gradients, estimate.training.fixed.gradient_bytes);
  EXPECT_EQ(memory_use(MemoryCategory::kOptimizer).peak_bytes - moments, estimate.training.fixed.optimizer_bytes);
  EXPECT_EQ(recovery.original_bytes(), estimate.original_bytes);
}

TEST(Recover, FrozenWeightsMayBeBf16) {
  const TempDir where;
  const fs::path directory = compressed(where, "lightmoe");
  Recovery recovery(directory, kModel, 2, {.dtype = DType::kBF16});
  for (const ParameterPtr& p : recovery.model().parameters()) {
    EXPECT_EQ(p->value.dtype(), p->trainable ? DType::kF32 : DType::kBF16) << p->name;
  }
  DataStream data = stream();
  TrainableOlmoe trainable(recovery.model());
  EXPECT_TRUE(std::isfinite(train(trainable, data, training(2), recovery.hooks(DType::kBF16)).loss));
  recovery.finish();
}

TEST(Recover, RefusesAnotherBase) {
  const TempDir where;
  const fs::path directory = compressed(where, "lightmoe");
  EXPECT_THROW(Recovery(directory, "tests/golden/plain", 2, {}), Error);
  EXPECT_THROW(Recovery(kModel, kModel, 2, {}), Error);  // not a compressed directory
}

}  // namespace
}  // namespace lightmoe
