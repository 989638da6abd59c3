// The pruning family: scores worked by hand, what removing means for the router, bytes, export, recovery.

#include "compress/pruning.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "compress/expert_scores.h"
#include "compress/exporter.h"
#include "loaders/json.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;
using testing::TempDir;

const std::vector<std::string> kFamily = {"frequency", "seer", "ean", "man", "msan", "reap", "aimer"};

// One layer, four experts, top 2. Tokens and what they saw (expert: gate, ||f||):
//   t0: 0: .5, 2;  1: .25, 4     t1: 0: .5, 2;  2: .25, 1     t2: 0: .5, 2;  2: .25, 3
LayerStatistics three_tokens() {
  LayerStatistics l;
  l.count = {3, 1, 2, 0};
  l.gate_mass = {1.5, .25, .5, 0};
  l.output_norm = {6, 4, 4, 0};
  l.gate_output_norm = {3, 1, 1, 0};
  l.output_norm2 = {12, 16, 10, 0};
  l.gate_output_norm2 = {6, 4, 2.5, 0};
  return l;
}

TEST(Pruning, ScoresByHand) {
  const LayerStatistics l = three_tokens();
  using Scores = std::vector<double>;
  EXPECT_EQ(expert_scores(l, {.mean = 0, .gate = 0, .norm = 0}), (Scores{3, 1, 2, 0}));
  EXPECT_EQ(expert_scores(l, {.mean = 0, .gate = 1, .norm = 0}), (Scores{1.5, .25, .5, 0}));
  EXPECT_EQ(expert_scores(l, {.mean = 0, .gate = 0, .norm = 1}), (Scores{6, 4, 4, 0}));
  EXPECT_EQ(expert_scores(l, {.mean = 1, .gate = 0, .norm = 1}), (Scores{2, 4, 2, 0}));
  EXPECT_EQ(expert_scores(l, {.mean = 1, .gate = 0, .norm = 2}), (Scores{4, 16, 5, 0}));
  EXPECT_EQ(expert_scores(l, {.mean = 1, .gate = 1, .norm = 1}), (Scores{1, 1, .5, 0}));
}

OlmoeConfig tiny_config() {
  OlmoeConfig c;
  c.vocab_size = 11, c.hidden_size = 4, c.intermediate_size = 2, c.num_layers = 1;
  c.num_heads = c.num_kv_heads = 1, c.num_experts = 4, c.num_experts_per_token = 2;
  return c;
}

// The experts a method leaves of the layer above when two may stay; ties go at the lower slot.
TEST(Pruning, PlansByHand) {
  const OlmoeConfig config = tiny_config();
  Statistics statistics = empty_statistics(1, 4, 4, false);
  statistics.tokens = 3;
  statistics.layers[0] = three_tokens();
  MethodOptions options;
  options.budget = {BudgetKind::kExpertsPerLayer, 2};
  const MethodInput input{.config = config, .statistics = statistics, .options = options};
  const std::map<std::string, std::vector<int32_t>> removed = {
      {"frequency", {1, 3}}, {"seer", {1, 3}}, {"ean", {1, 3}}, {"man", {0, 3}}, {"msan", {0, 3}}, {"reap", {2, 3}}};
  for (const auto& [name, expected] : removed) {
    const Plan plan = find_method(name).plan(input);
    EXPECT_EQ(plan.layers[0].replaced, expected) << name;
    for (const int32_t s : expected) {
      EXPECT_EQ(plan.layers[0].shape.slots[static_cast<size_t>(s)].kind, SlotKind::kRemoved) << name;
    }
    EXPECT_EQ(plan.layers[0].bank.size(), 2u);
    EXPECT_EQ(stored_parameters(plan.shapes(), model_size(config)), model_size(config).total() - 2 * 3 * 4 * 2);
  }
  options.selection.starved = StarvedPolicy::kKeep;  // expert 3, without tokens, stays
  EXPECT_EQ(find_method("frequency").plan(input).layers[0].replaced, (std::vector<int32_t>{1, 2}));
  options.selection.starved = StarvedPolicy::kError;
  EXPECT_TRUE(testing::fails_with(ErrorKind::kNumeric, {"layer 0", "experts 3"},
                                  [&] { find_method("frequency").plan(input); }));
}

// Six experts, each the worst by one score alone, so that a name which stands for another's score is seen.
TEST(Pruning, NamesMeanTheirScores) {
  OlmoeConfig config = tiny_config();
  config.num_experts = 6;
  Statistics statistics = empty_statistics(1, 6, 4, false);
  statistics.tokens = 40;
  LayerStatistics& l = statistics.layers[0];
  l.count = {5, 10, 10, 20, 10, 10};
  l.gate_mass = {10, 5, 10, 10, 10, 10};
  l.output_norm = {10, 10, 9, 11, 10, 10};
  l.output_norm2 = {10, 10, 10, 20, 5, 10};
  l.gate_output_norm = {10, 10, 10, 20, 10, 5};
  MethodOptions options;
  options.budget = {BudgetKind::kExpertsPerLayer, 5};
  const std::vector<std::string> names = {"frequency", "seer", "ean", "man", "msan", "reap"};
  for (size_t i = 0; i < names.size(); ++i) {
    const Plan plan = find_method(names[i]).plan({.config = config, .statistics = statistics, .options = options});
    EXPECT_EQ(plan.layers[0].replaced, (std::vector<int32_t>{static_cast<int32_t>(i)})) << names[i];
  }
}

TEST(Pruning, RefusesWhatLeavesTheRouterNoChoice) {
  const OlmoeConfig config = tiny_config();
  const Statistics statistics = uniform_statistics(1, 4, 4);
  MethodOptions options;
  options.budget = {BudgetKind::kExperts, .75};  // one of four would stay, a token chooses two
  const MethodInput input{.config = config, .statistics = statistics, .options = options};
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage,
                                  {"75 % of the expert weights is impossible", "2 experts per layer"},
                                  [&] { find_method("reap").plan(input); }));
  options.budget = {BudgetKind::kExpertsPerLayer, 1};
  EXPECT_THROW(find_method("reap").plan(input), Error);
  options.budget = {BudgetKind::kExperts, .5};
  EXPECT_EQ(find_method("reap").plan(input).layers[0].bank.size(), 2u);
}

// Two tokens of one sequence; columns of the logits as vectors: 0 (1,0), 1 (1,.1), 2 (0,1), 3 (.1,1). Experts 0 and 2 stay.
TEST(Pruning, RedirectedByHand) {
  const OlmoeConfig config = tiny_config();
  Statistics statistics = empty_statistics(1, 4, 4, false);
  statistics.tokens = 2;
  LayerStatistics& l = statistics.layers[0];
  l.count = {9, 1, 9, 1};
  l.sample_logits = {1, 1, 0, .1F, 0, .1F, 1, 1};
  statistics.sample_sequence = {0, 0}, statistics.sample_token = {0, 1};
  MethodOptions options;
  options.budget = {BudgetKind::kExpertsPerLayer, 2};
  options.redirect = true;
  const MethodInput input{.config = config, .statistics = statistics, .options = options};
  const LayerPlan layer = find_method("frequency").plan(input).layers[0];
  const std::vector<int32_t> expected = {0, 0, 1, 1};  // bank entries
  for (size_t s = 0; s < 4; ++s) {
    EXPECT_EQ(layer.shape.slots[s].kind, SlotKind::kExpert);
    EXPECT_EQ(layer.shape.slots[s].expert, expected[s]) << s;
  }
  EXPECT_EQ(layer.replaced, (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(layer.bank.size(), 2u);
  options.budget = {BudgetKind::kExpertsPerLayer, 1};  // all slots can be chosen, so one expert may serve
  EXPECT_EQ(find_method("frequency").plan(input).layers[0].bank.size(), 1u);
}

// A redirected model stores what the masked one does, and routes as the original does.
TEST(Pruning, RedirectingCostsNoBytes) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const auto redirect = [](MethodOptions& o) { o.redirect = true; };
  for (const char* method : {"reap", "aimer", "naee-greedy"}) {
    const CompressionRecord masked = ground.compress(method, .5, where / "masked");
    const CompressionRecord record = ground.compress(method, .5, where / "redirected", redirect);
    EXPECT_EQ(record.stored_bytes, masked.stored_bytes) << method;
    for (const LayerPlan& layer : record.plan.layers) {
      for (const Slot& slot : layer.shape.slots) EXPECT_EQ(slot.kind, SlotKind::kExpert) << method;
    }
  }
}

TEST(Pruning, RedirectedDemoLoss) {
  const CompressionGround& ground = CompressionGround::demo();
  const TempDir where;
  for (const char* method : {"reap", "frequency", "man"}) {
    double losses[2];
    for (const bool redirect : {false, true}) {
      ground.compress(method, .25, where / "out", [&](MethodOptions& o) { o.redirect = redirect; });
      losses[redirect] = ground.loss(where / "out");
    }
    fmt::print("             {:<18} demo model, 25 % of the experts removed: masked {:.3f}, redirected {:.3f}\n",
               method, losses[0], losses[1]);
    EXPECT_LT(losses[1], 3.5);  // half of a guess's
  }
}

// All weights of expert 0 equal: score 1, the most removable; expert 1 has one large weight: 1/sqrt(N), kept.
TEST(Pruning, AimerReadsWeightsAlone) {
  const TempDir where;
  OlmoeConfig config = tiny_config();
  const auto model = random_model(config, DType::kF32, 5);
  const auto fill = [&](size_t expert, float first, float rest) {
    for (const ParameterPtr& p :
         {model->blocks[0].moe.experts[expert].gate_up, model->blocks[0].moe.experts[expert].down}) {
      std::fill(p->value.data<float>(), p->value.data<float>() + p->value.numel(), rest);
    }
    model->blocks[0].moe.experts[expert].down->value.data<float>()[0] = first;
  };
  fill(0, -2, 2);
  fill(1, 3, 0);
  std::filesystem::create_directories(where / "model");
  save_model(*model, where / "model", DType::kF32, int64_t{1} << 30);
  const Checkpoint checkpoint(where / "model");
  const ExpertSource experts(checkpoint, config);
  MethodOptions options;
  options.budget = {BudgetKind::kExpertsPerLayer, 3};
  const Statistics statistics = uniform_statistics(1, 4, 4);
  const MethodInput input{.config = config, .statistics = statistics, .options = options, .experts = &experts};
  EXPECT_EQ(find_method("aimer").plan(input).layers[0].replaced, (std::vector<int32_t>{0}));
  options.budget = {BudgetKind::kExpertsPerLayer, 2};
  EXPECT_NE(find_method("aimer").plan(input).layers[0].shape.slots[1].kind, SlotKind::kRemoved);
}

TEST(Pruning, IdentityAtRatioZero) {
  for (const std::string& method : kFamily) testing::expect_identity_at_zero(method);
}

TEST(Pruning, BytesReallyFall) {
  for (const char* method : {"reap", "aimer"}) testing::expect_bytes_saved(method, .5);
}

// A masked slot is a deleted router row: the export has fewer experts and the same function.
TEST(Pruning, ExportsAsASmallerStockModel) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const CompressionRecord record = ground.compress("reap", .4, where / "out");
  const ExportReport report = export_to_hugging_face({.model = where / "out", .output = where / "stock"});
  const OlmoeConfig stock = read_config(where / "stock");
  EXPECT_EQ(stock.num_experts, static_cast<int64_t>(record.plan.layers[0].bank.size()));
  EXPECT_EQ(stock.num_experts, 38);                      // floor(64 * .6)
  EXPECT_LT(report.written_bytes, record.stored_bytes);  // the masked router rows go too
  EXPECT_TRUE(load_model(where / "stock", DType::kF32)->blocks[0].moe.is_plain());
  EXPECT_TRUE(testing::close(ground.logits(where / "stock"), testing::to_doubles(ground.logits(where / "out")), 1e-5));
  // Layers of different length have no stock form.
  Json config = parse_json(testing::get_file(where / "out" / "config.json"), "json");
  Json& kinds = config["lightmoe"]["layers"][1]["slots"]["kind"];
  const auto removed = std::find(kinds.begin(), kinds.end(), "removed");
  ASSERT_NE(removed, kinds.end());
  config["lightmoe"]["layers"][1]["slots"]["expert"][static_cast<size_t>(removed - kinds.begin())] = 0;
  *removed = "expert";
  testing::put_file(where / "out" / "config.json", config.dump());
  EXPECT_TRUE(testing::fails_with(ErrorKind::kInput, {"layer 0 has 38 slots", "layer 1 has 39"}, [&] {
    export_to_hugging_face({.model = where / "out", .output = where / "uneven"});
  }));
}

TEST(Pruning, DemoLoss) {
  for (const std::string& method : kFamily) testing::expect_useful_on_demo(method);
}

// LoRA on the survivors with as many trainable parameters as LightMoE has, merged afterwards: nothing grows.
TEST(Pruning, RecoversAtTheSameSize) { testing::expect_recovers("reap", .5, 0); }

}  // namespace
}  // namespace lightmoe
