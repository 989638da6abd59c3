// The planner against what the program itself counts: parameters and bytes of loaded models, memory of a training step, FLOPs that
// pass through the GEMM interface. And how expert diversity is measured.

#include "compress/footprint.h"

#include <gtest/gtest.h>

#include <cmath>

#include "autograd/optimizer.h"
#include "compress/diversity.h"
#include "compress/orthogonal.h"
#include "kernels/gemm.h"
#include "model/olmoe.h"
#include "model/summary.h"
#include "tests/support/compression.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

// A GEMM backend that counts and lets the reference compute; asleep unless a test wakes it.
bool counting = false;
double counted = 0;
const GemmBackend& reference() {
  for (const GemmBackend& backend : gemm_backends()) {
    if (backend.name == "reference") return backend;
  }
  throw std::logic_error("no reference backend");
}
const RegisterGemmBackend counter{{.name = "flop_counter",
                                   .supports = [](const GemmDesc& d) { return counting && reference().supports(d); },
                                   .cost = [](const GemmDesc&) { return 1e12; },
                                   .dense =
                                       [](const Gemm& op) {
                                         const GemmDesc d = describe(op);
                                         counted += 2.0 * static_cast<double>(d.m * d.n * d.k);
                                         reference().dense(op);
                                       },
                                   .grouped_m =
                                       [](const GroupedGemmM& op) {
                                         const GemmDesc d = describe(op);
                                         counted += 2.0 * static_cast<double>(d.m * d.n * d.k);
                                         reference().grouped_m(op);
                                       },
                                   .grouped_k = [](const GroupedGemmK& op) { reference().grouped_k(op); }}};

struct Counting {
  Counting() { counting = true, counted = 0; }
  ~Counting() { counting = false; }
};

Batch batch_of(const OlmoeConfig& config, int64_t tokens) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < tokens; ++i) ids.push_back(static_cast<int32_t>(i * 7 % config.vocab_size));
  return make_batch(ids, 1, tokens, ids);
}

TEST(Footprint, ParametersAndBytesAreThoseOfLoadedModels) {
  const auto& ground = testing::CompressionGround::golden();
  const testing::TempDir where;
  ground.compress("lightmoe", .5, where / "small");
  for (const std::filesystem::path& directory : {ground.model, where / "small"}) {
    const ModelSummary summary = summarize_model(directory);
    const int64_t before = memory_use(MemoryCategory::kWeights).live_bytes;
    const auto model = load_model(directory, DType::kF32);
    const int64_t live = memory_use(MemoryCategory::kWeights).live_bytes - before;
    const Footprint f =
        plan_footprint(summary.config, summary.slot_tables, {.stored = DType::kF32, .live = DType::kF32});
    EXPECT_EQ(f.parameters, model->num_parameters());
    EXPECT_EQ(f.live_bytes, live);
    EXPECT_EQ(f.stored_bytes, summary.total.bytes);
    EXPECT_EQ(f.active_parameters, summary.active_parameters);
  }
}

TEST(Footprint, FlopsAreThoseThatPassTheGemmInterface) {
  const OlmoeConfig config = read_config("tests/golden/e64k8");
  const auto model = load_model("tests/golden/e64k8", DType::kF32);
  const int64_t tokens = 12;
  const Counting now;
  const GemmBackendScope scope("flop_counter");
  const Tensor hidden = model->forward(batch_of(config, tokens), {});
  model->logits(hidden, {});
  // Attention is no GEMM call: context 0 leaves it out. The router's product may be a kernel of its own.
  const double planned = static_cast<double>(tokens * plan_footprint(config, {}, {.context = 0}).flops_per_token);
  const double router = 2.0 * static_cast<double>(tokens * config.num_layers * config.num_experts * config.hidden_size);
  EXPECT_TRUE(counted == planned || counted == planned - router) << counted << " counted, " << planned << " planned";
}

TEST(Footprint, TrainingMemoryOfAStep) {
  const OlmoeConfig config = read_config("demo/base");
  const auto model = load_model("demo/base", DType::kF32);
  const int64_t before = memory_use_total().live_bytes - model->stored_bytes(), tokens = 128;
  reset_peak_memory();
  Optimizer optimizer(model->parameters(), {});
  optimizer.zero_grad();
  model->forward_backward(batch_of(config, tokens), {.loss_scale = 1});
  optimizer.step(1e-4, optimizer.gradient_norm());
  const auto measured = static_cast<double>(memory_use_total().peak_bytes - before);
  const Footprint f = plan_footprint(config, {}, {.live = DType::kF32, .train_tokens = tokens});
  const auto fixed = static_cast<double>(f.training.fixed.total_bytes());
  EXPECT_EQ(fixed, 16.0 * static_cast<double>(f.parameters));  // weight, gradient, two moments
  // Moments come after the activations are gone: the peak lies between weights and gradients, and everything at once.
  EXPECT_LE(measured, 1.02 * static_cast<double>(f.training.total_bytes()));
  EXPECT_GE(measured, fixed);
}

TEST(Footprint, SectionsByHand) {
  OlmoeConfig c = *named_config("tiny");
  const int64_t d = c.hidden_size, f = c.intermediate_size, l = c.num_layers;
  const Footprint stock = plan_footprint(c, {}, {.context = 0}), two = plan_sections(c, 2, {.context = 0});
  // E experts of 3 D F and a router of E D go; two of 3 (D/2) F come: 3 D F a layer.
  EXPECT_EQ(stock.parameters - two.parameters, l * (c.num_experts * (3 * d * f + d) - 3 * d * f));
  // K experts and the router's product against 3 D F.
  EXPECT_EQ(stock.flops_per_token - two.flops_per_token,
            2 * l * ((c.num_experts_per_token - 1) * 3 * d * f + c.num_experts * d));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"--sections 3"}, [&] { plan_sections(c, 3, {}); }));
}

TEST(Diversity, CosinesByHand) {
  // (1,0), (0,2), (-3,0): cosines 0, -1, 0.
  const CosineSummary s = pairwise_cosine(Tensor::from(std::vector<double>{1, 0, 0, 2, -3, 0}, {3, 2}));
  EXPECT_DOUBLE_EQ(s.mean, -1.0 / 3);
  EXPECT_DOUBLE_EQ(s.mean_abs, 1.0 / 3);
  EXPECT_DOUBLE_EQ(s.largest, 0);
}

TEST(Diversity, RandomExpertsAreNearlyOrthogonal) {
  const auto& ground = testing::CompressionGround::golden();
  const auto layers = expert_diversity(ground.model, &ground.statistics, 16);
  ASSERT_EQ(layers.size(), 2u);
  for (const LayerDiversity& l : layers) {
    EXPECT_EQ(l.experts, 64);
    // Independent vectors of n entries have cosines of deviation 1/sqrt(n): here n = 3 D F >= 1536, so the mean |cos| is below 0.026.
    EXPECT_LT(l.weights.mean_abs, 0.03);
    EXPECT_GT(l.outputs.mean_abs, l.weights.mean_abs);  // outputs have D entries alone
    EXPECT_LT(l.outputs.mean_abs, 0.9);
  }
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"--sample-inputs"}, [&] {
    Statistics bare = ground.statistics;
    for (auto& l : bare.layers) l.sample_inputs.clear();
    expert_diversity(ground.model, &bare, 16);
  }));
}

TEST(Orthogonal, GradientsHaveNoPartAlongTheOtherExperts) {
  const auto model = load_model("tests/golden/e64k8", DType::kF64);
  const Batch batch = batch_of(model->config, 24);
  const auto dot = [](const ParameterPtr& g, const ParameterPtr& w, bool gradient) {
    const double *a = gradient ? g->grad.data<double>() : g->value.data<double>(), *b = w->value.data<double>();
    double sum = 0;
    for (int64_t i = 0; i < w->value.numel(); ++i) sum += a[i] * b[i];
    return sum;
  };
  model->forward_backward(batch, {});
  const MoeLayer& layer = model->blocks[1].moe;
  double before = 0;
  for (size_t i = 0; i < 64; ++i)
    before = std::max(before, std::fabs(dot(layer.experts[i].down, layer.experts[(i + 1) % 64].down, true)));
  EXPECT_GT(before, 1e-6);
  const Tensor router = model->blocks[1].moe.router->grad.clone();
  project_expert_gradients(*model);
  for (size_t i = 0; i < 64; ++i) {
    for (size_t j = 0; j < 64; ++j) {
      if (i == j) continue;
      for (const auto half : {&Expert::gate_up, &Expert::down}) {
        const ParameterPtr &g = layer.experts[i].*half, &w = layer.experts[j].*half;
        // f64 rounding, the solve's condition (near 1 for nearly orthogonal experts) and the ridge of 1e-13.
        EXPECT_LT(std::fabs(dot(g, w, true)), 1e-11 * std::sqrt(dot(w, w, false))) << i << " " << j;
      }
    }
  }
  EXPECT_TRUE(testing::bits_equal(router, model->blocks[1].moe.router->grad));
  const Tensor once = layer.experts[3].down->grad.clone();
  project_expert_gradients(*model);  // idempotent
  EXPECT_TRUE(testing::close(layer.experts[3].down->grad, testing::to_doubles(once), 1e-9));
}

TEST(Orthogonal, ActsOnTheChosenSteps) {
  const auto model = load_model("tests/golden/e64k8", DType::kF64);
  const auto plain = load_model("tests/golden/e64k8", DType::kF64);
  const Batch batch = batch_of(model->config, 24);
  plain->forward_backward(batch, {});
  OrthogonalOlmoe every_second(*model, 2);
  for (const int64_t step : {1, 2}) {
    for (const ParameterPtr& p : model->parameters()) p->zero_grad();
    every_second.before_step(step);
    every_second.forward_backward(batch, {});
    const auto same =
        testing::bits_equal(model->blocks[0].moe.experts[0].down->grad, plain->blocks[0].moe.experts[0].down->grad);
    EXPECT_EQ(static_cast<bool>(same), step == 1) << step;
  }
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"--orthogonal-every 0"}, [&] { OrthogonalOlmoe(*model, 0); }));
}

}  // namespace
}  // namespace lightmoe
