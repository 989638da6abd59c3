// LightMoE's variants that are not in the paper: importance, alignment, whitened start, ranks by energy, adaptive annealing,
// distillation while annealing, seeds of recovery.

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "compress/merging.h"
#include "compress/originals.h"
#include "compress/rank_allocation.h"
#include "compress/recover.h"
#include "compress/residuals.h"
#include "compress/unit_gradients.h"
#include "loaders/json.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"
#include "tests/support/tiny_experts.h"

namespace lightmoe {
namespace {

namespace fs = std::filesystem;
using testing::CompressionGround;
using testing::fails_with;
using testing::TempDir;
using testing::TinyModel;

TEST(Variants, ReapImportanceIsTheMeanGatedNorm) {
  LayerStatistics layer = empty_statistics(1, 4, 4, false).layers[0];
  layer.count = {2, 1, 0, 4};
  layer.gate_mass = {1, 1, 0, 2};
  layer.gate_output_norm = {6, 2, 0, 8};  // means 3, 2, 0, 2
  EXPECT_EQ(importance_scores(layer, Importance::kReap), (std::vector<double>{3. / 7, 2. / 7, 0, 2. / 7}));
  EXPECT_EQ(importance_scores(layer, Importance::kGate), (std::vector<double>{.25, .25, 0, .5}));
  EXPECT_EQ(importance_scores(empty_statistics(1, 4, 4, false).layers[0], Importance::kReap),
            (std::vector<double>{.25, .25, .25, .25}));
  EXPECT_TRUE(
      fails_with(ErrorKind::kUsage, {"importance \"mass\"", "gate, reap or taylor"}, [] { parse_importance("mass"); }));
}

// The derivative of the loss along W_d of one expert, by central differences, is what Taylor importance sums over sequences.
TEST(Variants, TaylorImportanceIsTheLossWithoutTheExpert) {
  const CompressionGround& ground = CompressionGround::golden();
  const auto model = load_model(ground.model, DType::kF32);
  const std::vector<int32_t> ids(ground.calibration[0].ids.begin(), ground.calibration[0].ids.begin() + 12);
  Statistics statistics = empty_statistics(2, 64, model->config.hidden_size, false);
  std::vector<int32_t> labels(ids.begin() + 1, ids.end());
  labels.push_back(-100);
  add_unit_gradients(*model, {ids}, {labels}, GemmCompute::kF32, statistics);
  std::vector<int32_t> positions(ids.size());
  std::iota(positions.begin(), positions.end(), 0);
  const Batch batch = make_packed_batch(ids, labels, positions, {0, static_cast<int32_t>(ids.size())});
  const auto loss = [&] { return model->forward_backward(batch, {}).ce_sum / static_cast<double>(ids.size() - 1); };
  int64_t checked = 0;
  for (size_t e = 0; e < 64 && checked < 3; ++e) {
    const double found = statistics.layers[1].taylor[e];
    if (found < 1e-3) continue;
    const Tensor w = model->blocks[1].moe.experts[e].down->value, kept = w.clone();
    double slope = 0;
    for (const double h :
         {1., -1.}) {  // 5 % of the weights: f32 losses are good to 1e-6, cubic terms to a few per cent
      for (int64_t i = 0; i < w.numel(); ++i)
        w.data<float>()[i] = kept.data<float>()[i] * static_cast<float>(1 + .05 * h);
      slope += h * loss() / .1;
    }
    w.copy_from(kept);
    EXPECT_NEAR(found, std::abs(slope), .05 * found + 1e-4) << e;
    ++checked;
  }
  EXPECT_EQ(checked, 3);
  TinyModel bare(1, [](int64_t, int64_t, ExpertMatrix, int64_t, int64_t) { return 1.f; });
  bare.options.bases = 1;
  bare.options.selection.importance = Importance::kTaylor;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--importance taylor needs gradients", "--unit-gradients"},
                         [&] { bare.plan("lightmoe"); }));
}

// Expert 1 is expert 0 with its two hidden units exchanged: the same function, so that aligned nothing is left of the difference.
TEST(Variants, AlignedMembersThatAreEqualLeaveNothing) {
  const auto fill = [](int64_t, int64_t e, ExpertMatrix m, int64_t r, int64_t c) -> float {
    const int64_t unit = m == ExpertMatrix::kDown ? c : r, other = m == ExpertMatrix::kDown ? r : c;
    const int64_t original = e == 1 ? 1 - unit : unit;
    return static_cast<float>(1 + original * 3 + other * other + (m == ExpertMatrix::kUp ? 5 : 0) + (e > 1 ? 7 : 0));
  };
  TinyModel model(1, fill);
  const BankEntry base{.experts = {0, 1}, .weights = {.5, .5}};
  const auto left = [&](int32_t expert) {
    Residuals residuals(model.input(), false);
    double sum = 0;
    for (const ExpertMatrix m : kExpertMatrices) {
      for (const double s : residuals.singular_values({0, expert, m}, base, 2)) sum += s * s;
    }
    return sum;
  };
  EXPECT_GT(left(0), 1);
  model.options.align = true;
  EXPECT_EQ(left(0), 0);
  EXPECT_EQ(left(1), 0);
}

// Beside base 0, experts 1, 2, 3 differ in gate by diag(3,0), diag(2,2), diag(5,1): of four ranks one is free, and the second of expert
// 2 (energy 4) is worth most.
TEST(Variants, RanksGoWhereTheEnergyIs) {
  const float diagonal[4][2] = {{0, 0}, {3, 0}, {2, 2}, {5, 1}};
  const TinyModel model(1, [&](int64_t, int64_t e, ExpertMatrix m, int64_t r, int64_t c) -> float {
    return m == ExpertMatrix::kGate && r == c ? diagonal[e][r] : 0;
  });
  Plan plan;
  plan.layers.resize(1);
  LayerPlan& layer = plan.layers[0];
  layer.bank = {{{0}, {1.0}}};
  layer.shape.slots.assign(4, Slot{.expert = 0});
  layer.adapter_slot = {1, 2, 3};
  layer.shape.adapter_rank = {2, 1, 1};
  allocate_ranks(plan, model.input(), 1);
  EXPECT_EQ(layer.shape.adapter_rank, (std::vector<int64_t>{1, 2, 1}));
}

double residual_energy(const fs::path& directory, const CompressionRecord& record) {
  const auto original = load_model(CompressionGround::golden().model, DType::kF32);
  const auto model = load_model(directory, DType::kF32);
  double sum = 0;
  for (size_t l = 0; l < model->blocks.size(); ++l) {
    const MoeLayer& moe = model->blocks[l].moe;
    for (const int32_t slot : record.plan.layers[l].replaced) {
      const Slot& s = moe.slots[static_cast<size_t>(slot)];
      const Expert &base = moe.experts[static_cast<size_t>(s.expert)],
                   &own = original->blocks[l].moe.experts[static_cast<size_t>(slot)];
      for (const AdapterPart& part : parts_of(moe.adapters[static_cast<size_t>(s.adapter)])) {
        const Tensor left = matrix_of(own, part.matrix).clone();
        const Tensor of_base = matrix_of(base, part.matrix);
        for (int64_t i = 0; i < left.numel(); ++i) left.data<float>()[i] -= of_base.data<float>()[i];
        add_product(left, part.b, part.a, -1);
        for (int64_t i = 0; i < left.numel(); ++i) sum += std::pow(static_cast<double>(left.data<float>()[i]), 2);
      }
    }
  }
  return sum;
}

TEST(Variants, RanksByEnergyLeaveLessAtTheSameSize) {
  const TempDir where;
  double left[2];
  int64_t parameters[2], ranks[2] = {0, 0};
  for (const bool energy : {false, true}) {
    const fs::path directory = where / (energy ? "energy" : "equal");
    const CompressionRecord record =
        CompressionGround::golden().compress("lightmoe", .5, directory, [&](MethodOptions& o) {
          o.rank = 2, o.adapter_init = AdapterInit::kSvd;
          if (energy) o.rank_allocation = RankAllocation::kEnergy;
        });
    left[energy] = residual_energy(directory, record);
    parameters[energy] = record.stored_parameters;
    for (const LayerPlan& layer : record.plan.layers) {
      for (const int64_t rank : layer.shape.adapter_rank) {
        ranks[energy] += rank;
        EXPECT_GE(rank, 1);
        EXPECT_LE(rank, 8);
      }
    }
  }
  EXPECT_EQ(parameters[0], parameters[1]);
  EXPECT_EQ(ranks[0], ranks[1]);
  EXPECT_LT(left[1], .999 * left[0]);
}

// The flag is what lightmoe-free-w is made of.
TEST(Variants, WhitenedStartIsTheTrainFreeMethods) {
  const TempDir where;
  const CompressionGround& ground = CompressionGround::golden();
  ground.compress("lightmoe", .5, where / "flag", [](MethodOptions& o) { o.adapter_init = AdapterInit::kWhitenedSvd; });
  ground.compress("lightmoe-free-w", .5, where / "method");
  ground.compress("lightmoe", .5, where / "plain", [](MethodOptions& o) { o.adapter_init = AdapterInit::kSvd; });
  EXPECT_EQ(testing::get_file(where / "flag" / "model.safetensors"),
            testing::get_file(where / "method" / "model.safetensors"));
  EXPECT_NE(testing::get_file(where / "flag" / "model.safetensors"),
            testing::get_file(where / "plain" / "model.safetensors"));
  TinyModel bare(1, [](int64_t, int64_t, ExpertMatrix, int64_t, int64_t) { return 1.f; });
  bare.options.bases = 1;
  bare.options.adapter_init = AdapterInit::kWhitenedSvd;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"svd-whitened needs a sample of inputs", "--sample-inputs"},
                         [&] { bare.plan("lightmoe"); }));
}

TEST(Variants, AdaptiveClockSlowsDownWhileTheLossRises) {
  const Annealing annealing{.eps = .2, .shape = AnnealShape::kAdaptive};
  AnnealingClock falling(annealing, 100), rising(annealing, 100);
  EXPECT_EQ(falling.beta(), 1);
  for (int t = 1; t <= 20; ++t) falling.observe(t, 1.0 / t);
  EXPECT_EQ(falling.beta(), 0);  // as linear
  rising.observe(1, 1);
  EXPECT_DOUBLE_EQ(rising.state().progress, 1);
  rising.observe(2, 2);  // mean 0.8 + 0.4 = 1.2 > 1.05; 19 of 20 left for 39 steps until step 40: more than 1/4 each
  EXPECT_DOUBLE_EQ(rising.state().mean, 1.2);
  EXPECT_DOUBLE_EQ(rising.state().progress, 1 + 19. / 39);
  for (int t = 3; t < 40; ++t) rising.observe(t, t);
  EXPECT_GT(rising.beta(), 0);
  rising.observe(40, 40);
  EXPECT_EQ(rising.beta(), 0);  // twice eps at most
  AnnealingClock late(annealing, 100);
  for (int t = 1; t <= 16; ++t) late.observe(t, 1);
  late.observe(17, 3);
  EXPECT_DOUBLE_EQ(late.state().progress, 16.25);
}

fs::path compressed(const TempDir& where, const std::string& name, const std::function<void(MethodOptions&)>& change) {
  CompressionGround::golden().compress("lightmoe", .5, where / name, [&](MethodOptions& o) {
    o.rank = 2;
    change(o);
  });
  return where / name;
}

Batch first_batch() {
  DataStream stream(CompressionGround::golden().calibration, {.rows = 2, .length = 24});
  return to_batch(stream.next());
}

TEST(Variants, OriginalsFadeInTheOrderOfTheirBase) {
  const TempDir where;
  const fs::path model = CompressionGround::golden().model;
  const fs::path directory = compressed(where, "aligned", [](MethodOptions& o) { o.align = true; });
  Recovery recovery(directory, model, 10, {});
  recovery.hooks(DType::kF32).before_step(1);
  const Batch batch = first_batch();
  const auto original = load_model(model, DType::kF32);
  // The same sums in another order: a few roundings of f32.
  const double expected = original->forward_backward(batch, {}).ce_sum;
  EXPECT_NEAR(recovery.model().forward_backward(batch, {}).ce_sum, expected, 1e-6 * expected);
  int64_t moved = 0;
  for (size_t l = 0; l < 2; ++l) {
    const LayerPlan& plan = recovery.record().plan.layers[l];
    for (const AnnealedSlot& slot : recovery.model().blocks[l].moe.annealed) {
      const auto entry = static_cast<size_t>(plan.shape.slots[static_cast<size_t>(slot.slot)].expert);
      const auto agreement = [&](const Expert& e) {  // of the units with those of the base's first member
        const Expert& first = original->blocks[l].moe.experts[static_cast<size_t>(plan.bank[entry].experts[0])];
        double sum = 0;
        for (const auto& [a, b] : {std::pair(e.gate_up, first.gate_up), std::pair(e.down, first.down)}) {
          for (int64_t i = 0; i < a->value.numel(); ++i)
            sum += static_cast<double>(a->value.data<float>()[i]) * static_cast<double>(b->value.data<float>()[i]);
        }
        return sum;
      };
      const Expert& own = original->blocks[l].moe.experts[static_cast<size_t>(slot.slot)];
      EXPECT_GE(agreement(slot.original), agreement(own) - 1e-6);
      moved += agreement(slot.original) > agreement(own) + 1e-3 ? 1 : 0;
    }
  }
  EXPECT_GT(moved, 10);
}

TEST(Variants, TheTeacherIsTheOriginalModel) {
  const TempDir where;
  const fs::path model = CompressionGround::golden().model;
  const Batch batch = first_batch();
  for (const AdapterInit init : {AdapterInit::kGaussian, AdapterInit::kSvd}) {
    const fs::path directory = compressed(where, name_of(init), [&](MethodOptions& o) { o.adapter_init = init; });
    Recovery recovery(directory, model, 10, {.annealing = Annealing{.eps = .4}, .distill = .5});
    const TrainerHooks hooks = recovery.hooks(DType::kF32);
    hooks.before_step(1);
    recovery.trainable().forward_backward(batch, {});
    EXPECT_NEAR(recovery.teacher_kl(), 0, 1e-6) << name_of(init);  // the student is the original still
    hooks.before_step(3);                                          // beta .5
    const TrainLosses middle = recovery.trainable().forward_backward(batch, {});
    EXPECT_GT(recovery.teacher_kl(), 1e-6) << name_of(init);
    EXPECT_NEAR(middle.ce_sum, recovery.model().forward_backward(batch, {}).ce_sum, 1e-4);
    hooks.before_step(5);  // beta 0: no teacher any more
    recovery.trainable().forward_backward(batch, {});
    EXPECT_EQ(recovery.teacher_kl(), 0);
    EXPECT_EQ(recovery.original_bytes(), 0);
  }
  const fs::path directory = where / "gaussian";
  const auto bytes = [&](double weight) {
    Recovery recovery(directory, model, 10, {.distill = weight});
    recovery.hooks(DType::kF32).before_step(1);
    return memory_use(MemoryCategory::kWeights).live_bytes;
  };
  EXPECT_EQ(bytes(.5), bytes(0));  // made of what is there
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--distill needs the originals", "--anneal 0"},
                         [&] { Recovery(directory, model, 10, {.annealing = Annealing{.eps = 0}, .distill = .5}); }));
  EXPECT_TRUE(
      fails_with(ErrorKind::kUsage, {"--distill 1.5"}, [&] { Recovery(directory, model, 10, {.distill = 1.5}); }));
}

TEST(Variants, AnAdaptiveClockSurvivesARestart) {
  const TempDir where;
  const fs::path directory = compressed(where, "plain", [](MethodOptions&) {});
  const RecoveryOptions options{.annealing = Annealing{.eps = .4, .shape = AnnealShape::kAdaptive}};
  Recovery first(directory, CompressionGround::golden().model, 10, options);
  const TrainerHooks hooks = first.hooks(DType::kF32);
  for (int64_t step = 1; step <= 3; ++step) {
    hooks.before_step(step);
    hooks.after_step({.step = step, .loss = static_cast<double>(step)});
  }
  hooks.before_step(4);
  Recovery second(directory, CompressionGround::golden().model, 10, options);
  const TrainerHooks again = second.hooks(DType::kF32);
  again.load_extra(parse_json(hooks.save_extra().dump(), "json"));
  again.before_step(4);
  const double beta = first.model().blocks[0].moe.beta;
  EXPECT_EQ(second.model().blocks[0].moe.beta, beta);
  EXPECT_GT(beta, Annealing{.eps = .4}.beta(3, 10));  // behind the linear one
}

TEST(Variants, TheSeedOfRecoveryDrawsTheAdapters) {
  const TempDir where;
  const fs::path directory = compressed(where, "plain", [](MethodOptions&) {}),
                 svd = compressed(where, "svd", [](MethodOptions&o) { o.adapter_init = AdapterInit::kSvd; });
  const auto drawn = [&](const fs::path& from, std::optional<uint64_t> seed) {
    Recovery recovery(from, CompressionGround::golden().model, 10, {.seed = seed});
    std::vector<float> values;
    const Tensor& a = recovery.model().blocks[0].moe.adapters[0].a_gate_up->value;
    return std::vector<float>(a.data<float>(), a.data<float>() + a.numel());
  };
  EXPECT_EQ(drawn(directory, 5), drawn(directory, 5));
  EXPECT_NE(drawn(directory, 5), drawn(directory, 6));
  EXPECT_EQ(drawn(svd, 5), drawn(svd, 6));  // they hold something
}

}  // namespace
}  // namespace lightmoe
