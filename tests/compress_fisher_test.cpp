// Units removed inside experts: scores against finite differences, plans by hand, ragged models through every path.

#include <gtest/gtest.h>

#include "compress/exporter.h"
#include "compress/unit_gradients.h"
#include "model/summary.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"
#include "tests/support/tiny_experts.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;
using testing::TempDir;
using testing::TinyModel;

const char* const kScopes[] = {"fisher-e", "fisher-l", "fisher-g"};

// Weight (row, column) of expert e, so that a moved one is seen.
float digits(int64_t layer, int64_t e, ExpertMatrix matrix, int64_t row, int64_t column) {
  return static_cast<float>(layer * 1000 + e * 100 + static_cast<int64_t>(matrix) * 30 + row * 5 + column);
}

// Two layers of four experts of two units. Unit 1 is always the better one; layer 1 feels everything ten times as much.
struct TwoLayers : TinyModel {
  TwoLayers() : TinyModel(2, digits) {
    statistics.layers[0].unit_gradient2 = {1, 9, 2, 8, 3, 7, 4, 6};
    statistics.layers[1].unit_gradient2 = {10, 90, 20, 80, 30, 70, 40, 60};
    options.budget = {BudgetKind::kExpertsPerLayer, 3};  // 12 of 16 units
  }
};

std::vector<std::vector<int64_t>> widths(const Plan& plan) {
  std::vector<std::vector<int64_t>> all;
  for (const LayerPlan& layer : plan.layers) all.push_back(layer.shape.widths);
  return all;
}

TEST(Fisher, PlansByHand) {
  const TwoLayers tiny;
  using Widths = std::vector<std::vector<int64_t>>;
  EXPECT_EQ(widths(tiny.plan("fisher-e")), (Widths{{1, 1, 1, 1}, {1, 1, 1, 1}}));  // floor(12 / 8) of each
  EXPECT_EQ(widths(tiny.plan("fisher-l")), (Widths{{1, 1, 2, 2}, {1, 1, 2, 2}}));  // the best of each, then 4 and 3
  EXPECT_EQ(widths(tiny.plan("fisher-g")), (Widths{{1, 1, 1, 1}, {}}));  // then 40, 30, 20 and 10: layer 1 is whole
  const Plan plan = tiny.plan("fisher-l");
  EXPECT_EQ(plan.layers[0].replaced, (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(plan.fading(), 0);  // nothing of an original's shape to fade into
  // Unit 1 of expert 1 in layer 1: row 1 of gate and up, column 1 of down.
  const auto values = [&](ExpertMatrix m) {
    return testing::to_doubles(plan.computed.at(bank_tensor_name(1, 1, m))());
  };
  EXPECT_EQ(values(ExpertMatrix::kGate), (std::vector<double>{1105, 1106, 1107, 1108}));
  EXPECT_EQ(values(ExpertMatrix::kUp), (std::vector<double>{1135, 1136, 1137, 1138}));
  EXPECT_EQ(values(ExpertMatrix::kDown), (std::vector<double>{1161, 1166, 1171, 1176}));
  const ModelSize size = model_size(tiny.config);
  EXPECT_EQ(stored_parameters(plan.shapes(), size), size.total() - 4 * 3 * 4);
}

TEST(Fisher, ExpertsWithoutTokensAndImpossibleBudgets) {
  TwoLayers tiny;
  tiny.statistics.layers[0].count = {1, 1, 0, 1};
  tiny.statistics.layers[1].count = {1, 1, 1, 1};
  tiny.options.selection.starved = StarvedPolicy::kKeep;
  EXPECT_EQ(widths(tiny.plan("fisher-l"))[0], (std::vector<int64_t>{1, 1, 2, 2}));
  tiny.options.budget = {BudgetKind::kExperts, .4};  // 9 of 16 units: 4 a layer
  EXPECT_EQ(widths(tiny.plan("fisher-l"))[0], (std::vector<int64_t>{1, 1, 1, 1}));
  tiny.options.budget = {BudgetKind::kExperts, .3};  // 11 of 16 units: 5 a layer, the starved expert is whole
  EXPECT_EQ(widths(tiny.plan("fisher-l"))[0], (std::vector<int64_t>{1, 1, 2, 1}));
  tiny.options.selection.starved = StarvedPolicy::kError;
  EXPECT_TRUE(testing::fails_with(ErrorKind::kNumeric, {"layer 0", "experts 2"}, [&] { tiny.plan("fisher-l"); }));
  tiny.options.budget = {BudgetKind::kExperts, .51};
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"51 % of the expert weights is impossible", "one unit of every"},
                                  [&] { tiny.plan("fisher-g"); }));
  tiny.options.budget = {BudgetKind::kExperts, .3};
  tiny.options.selection.starved = StarvedPolicy::kUnimportant;
  for (LayerStatistics& layer : tiny.statistics.layers) layer.unit_gradient2.resize(12);
  EXPECT_TRUE(testing::fails_with(ErrorKind::kInput, {"3 units per expert", "have 2"}, [&] { tiny.plan("fisher-e"); }));
}

// d loss / d weight by central differences in double, for every weight of two experts.
TEST(Fisher, ScoresAreSquaredGradientsOfEachSequence) {
  OlmoeConfig config;
  config.vocab_size = 11, config.hidden_size = 4, config.intermediate_size = 3, config.num_layers = 2;
  config.num_heads = config.num_kv_heads = 1, config.num_experts = 3, config.num_experts_per_token = 2;
  config.initializer_range = .5;
  const auto model = random_model(config, DType::kF32, 3);
  const auto precise = random_model(config, DType::kF64, 3);
  for (size_t i = 0; i < model->parameters().size(); ++i) {
    precise->parameters()[i]->value.copy_from(model->parameters()[i]->value);
  }
  // The third is counted in one place, the fourth nowhere.
  const std::vector<std::vector<int32_t>> sequences = {{1, 2, 3, 4, 5}, {6}, {7, 8, 9}, {2, 1}};
  const std::vector<std::vector<int32_t>> labels = {{2, 3, 4, 5, -100}, {-100}, {-100, 9, -100}, {-100, -100}};
  Statistics statistics = empty_statistics(2, 3, 4, false);
  model->parameters()[3]->trainable = false;
  add_unit_gradients(*model, sequences, labels, GemmCompute::kF32, statistics);
  EXPECT_FALSE(model->parameters()[3]->trainable);  // as it was
  EXPECT_TRUE(model->parameters()[4]->trainable);
  for (const ParameterPtr& p : precise->parameters()) p->trainable = false;
  const auto loss = [&](size_t s) {
    const std::vector<int32_t>& ids = sequences[s];
    const std::vector<int32_t> counted = s == 0 ? ids : std::vector<int32_t>{-100, -100, 9};
    const TrainLosses sums =
        precise->forward_backward(make_batch(ids, 1, static_cast<int64_t>(ids.size()), counted), {});
    return sums.ce_sum / (s == 0 ? 4 : 1);
  };
  const auto slope2 = [&](double& w, size_t s) {
    const double before = w, step = 1e-5;
    w = before + step;
    const double up = loss(s);
    w = before - step;
    const double down = loss(s);
    w = before;
    return (up - down) / (2 * step) * (up - down) / (2 * step);
  };
  for (const int64_t e : {0, 2}) {
    const Expert& expert = precise->blocks[1].moe.experts[static_cast<size_t>(e)];
    for (int64_t j = 0; j < 3; ++j) {
      double expected = 0;
      for (const size_t s : {0u, 2u}) {
        for (int64_t k = 0; k < 4; ++k) {
          expected += slope2(expert.gate_up->value.data<double>()[j * 4 + k], s) / 4;
          expected += slope2(expert.gate_up->value.data<double>()[(3 + j) * 4 + k], s) / 4;
          expected += slope2(expert.down->value.data<double>()[k * 3 + j], s) / 4;
        }
      }
      const double found = statistics.layers[1].unit_gradient2[static_cast<size_t>(e * 3 + j)];
      EXPECT_NEAR(found, expected, 1e-4 * expected + 1e-12) << "expert " << e << ", unit " << j;
    }
  }
}

TEST(Fisher, StatisticsAreKeptAddedAndAskedFor) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  save_statistics(ground.statistics, where / "s.safetensors");
  const Statistics read = load_statistics(where / "s.safetensors");
  EXPECT_EQ(read.layers[1].unit_gradient2, ground.statistics.layers[1].unit_gradient2);
  EXPECT_EQ(read.sample_ids, ground.statistics.sample_ids);
  EXPECT_EQ(std::ssize(read.sample_ids), read.sample_size());
  const Statistics both = merge_statistics({read, read});
  EXPECT_EQ(both.layers[0].unit_gradient2[7], 2 * read.layers[0].unit_gradient2[7]);
  EXPECT_EQ(std::ssize(both.sample_ids), both.sample_size());
  EXPECT_EQ(read.sample_labels, ground.statistics.sample_labels);
  EXPECT_EQ(std::ssize(both.sample_labels), both.sample_size());
  Statistics old = read;
  old.sample_labels.clear();
  EXPECT_TRUE(merge_statistics({read, old}).sample_labels.empty());
  EXPECT_TRUE(merge_statistics({old, read}).sample_labels.empty());
  Statistics bare = read;
  for (LayerStatistics& layer : bare.layers) layer.unit_gradient2.clear();
  EXPECT_TRUE(merge_statistics({read, bare}).layers[0].unit_gradient2.empty());
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"fisher-l", "--unit-gradients"},
                                  [&] { check_needs(find_method("fisher-l"), {}, bare); }));
  bare = read;
  bare.layers[1].unit_gradient2[3] = -1;
  save_statistics(bare, where / "bad.safetensors");
  EXPECT_TRUE(testing::fails_with(ErrorKind::kNumeric, {"unit_gradient2", "layer 1", "-1"},
                                  [&] { load_statistics(where / "bad.safetensors"); }));
}

TEST(Fisher, IdentityAtRatioZero) {
  for (const char* method : kScopes) testing::expect_identity_at_zero(method);
}
TEST(Fisher, BytesReallyFall) {
  for (const char* method : kScopes) testing::expect_bytes_saved(method, .5);
}
TEST(Fisher, ExportsAsTheSameFunction) {
  for (const char* method : kScopes) testing::expect_export_is_the_same(method, .5);
  // The same number of units everywhere is a smaller stock model.
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  ground.compress("fisher-e", .5, where / "out");
  const ExportReport report = export_to_hugging_face({.model = where / "out", .output = where / "stock"});
  EXPECT_EQ(read_config(where / "stock").intermediate_size, read_config(ground.model).intermediate_size / 2);
  EXPECT_LE(report.written_bytes, report.compressed_bytes);
}
TEST(Fisher, Recovers) {
  for (const char* method : {"fisher-e", "fisher-g"}) testing::expect_recovers(method, .5, 0);
}
TEST(Fisher, InspectShowsTheWidths) {
  const TempDir where;
  CompressionGround::golden().compress("fisher-g", .5, where / "out");
  const ModelSummary summary = summarize_model(where / "out");
  int64_t units = 0, smallest = 16;
  for (const LayerSummary& layer : summary.layers) {
    EXPECT_EQ(layer.widths.size(), 64u);
    for (const int64_t width : layer.widths) units += width, smallest = std::min(smallest, width);
  }
  EXPECT_LE(units, 2 * 64 * 16 / 2);
  EXPECT_GT(units, 2 * 64 * 16 / 2 - 64);
  EXPECT_GE(smallest, 1);
  // A token meets the eight widest experts of a layer at most: with half the units everywhere, half of each.
  CompressionGround::golden().compress("fisher-e", .5, where / "even");
  const ModelSummary whole = summarize_model(CompressionGround::golden().model), even = summarize_model(where / "even");
  EXPECT_EQ(whole.active_parameters - even.active_parameters, 2 * 8 * 3 * whole.config.hidden_size * 8);
}
TEST(Fisher, DemoLoss) {
  for (const char* method : kScopes) testing::expect_useful_on_demo(method);
}

}  // namespace
}  // namespace lightmoe
