// MoBE, SLBF and MoLAE's options: exact cases, what the fit minimises, sizes, bytes, export, recovery, impossible budgets.

#include "compress/latent_fit.h"

#include <gtest/gtest.h>

#include <cmath>

#include "compress/expert_sample.h"
#include "compress/exporter.h"
#include "compress/footprint.h"
#include "compress/latent_weights.h"
#include "compress/linear_algebra.h"
#include "compress/recover.h"
#include "loaders/json.h"
#include "model/summary.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"
#include "tests/support/tiny_experts.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;
using testing::TempDir;
using testing::TinyModel;

double silu(double x) { return x / (1 + std::exp(-x)); }

double relative_error(const LatentFit& fit, const Tensor& w, const LatentFitSizes& s) {
  const Tensor mix = fit.mix();
  double error = 0, whole = 0;
  for (int64_t e = 0; e < s.latents; ++e) {
    for (int64_t i = 0; i < s.width; ++i) {
      for (int64_t k = 0; k < s.hidden; ++k) {
        double made = 0;
        for (int64_t m = 0; m < s.size; ++m) {
          double sum = 0;
          for (int64_t j = 0; j < s.bases; ++j) {
            double b = 0;
            if (s.rank == 0 || m < s.rank) {
              b = static_cast<double>(fit.basis(j).row(m).data<float>()[k]);
            } else {
              for (int64_t r = 0; r < s.rank; ++r)
                b += static_cast<double>(fit.left(j).row(m - s.rank).data<float>()[r]) *
                     static_cast<double>(fit.basis(j).row(r).data<float>()[k]);
            }
            sum += static_cast<double>(mix.row(e).data<float>()[j]) * b;
          }
          made += static_cast<double>(fit.a().row(e * s.width + i).data<float>()[m]) * silu(sum);
        }
        const auto wanted = static_cast<double>(w.row(e * s.width + i).data<float>()[k]);
        error += (made - wanted) * (made - wanted), whole += wanted * wanted;
      }
    }
  }
  return error / whole;
}

// One expert, one basis, one number: W = 2, A = 3, B = 1, so A silu(B) = 3 sigma(1) = 2.193 and the error is known before the first step.
TEST(LatentFit, ByHand) {
  const LatentFitSizes sizes{.latents = 1, .width = 2, .hidden = 1, .size = 1, .bases = 1};
  LatentFit fit(sizes);
  const Tensor w = Tensor::from<float>({2, -2}, {2, 1});
  fit.a().copy_from(Tensor::from<float>({3, -3}, {2, 1}));
  fit.basis(0).copy_from(Tensor::from<float>({1}, {1, 1}));
  const LatentFit::Errors errors = fit.fit(w, {.steps = 300});
  const double miss = 3 * silu(1) - 2;
  EXPECT_NEAR(errors.before, miss * miss / 4, 1e-6);
  EXPECT_LT(errors.after, 1e-6);
  EXPECT_NEAR(static_cast<double>(fit.a().data<float>()[0]) * silu(static_cast<double>(fit.basis(0).data<float>()[0])),
              2, 2e-3);
  EXPECT_EQ(fit.mix().data<float>()[0], 1);
}

// The loss the fit reports is the one of the equation; matrices that the family holds exactly are found again from near them.
TEST(LatentFit, FindsWhatItCanHold) {
  for (const int64_t rank : {0, 2}) {
    SCOPED_TRACE(rank);
    const LatentFitSizes sizes{.latents = 3, .width = 4, .hidden = 7, .size = 3, .bases = 2, .rank = rank};
    LatentFit truth(sizes), fit(sizes);
    const auto fill = [&](const LatentFit& to, uint64_t seed) {
      to.a().copy_from(testing::random_tensor(to.a().shape(), DType::kF32, seed));
      to.logits().copy_from(testing::random_tensor(to.logits().shape(), DType::kF32, seed + 1));
      for (int64_t j = 0; j < 2; ++j) {
        const auto at = seed + 2 + 2 * static_cast<uint64_t>(j);
        to.basis(j).copy_from(testing::random_tensor(to.basis(j).shape(), DType::kF32, at));
        if (rank > 0) to.left(j).copy_from(testing::random_tensor(to.left(j).shape(), DType::kF32, at + 1));
      }
    };
    fill(truth, 1);
    // W from the equation, by way of the error against zero matrices.
    const Tensor w = Tensor::zeros({12, 7}, DType::kF32);
    const Tensor mix = truth.mix();
    for (int64_t e = 0; e < 3; ++e) {
      for (int64_t m = 0; m < 3; ++m) {
        for (int64_t k = 0; k < 7; ++k) {
          double sum = 0;
          for (int64_t j = 0; j < 2; ++j) {
            double b = 0;
            if (rank == 0 || m < rank) {
              b = static_cast<double>(truth.basis(j).row(m).data<float>()[k]);
            } else {
              for (int64_t r = 0; r < rank; ++r)
                b += static_cast<double>(truth.left(j).row(m - rank).data<float>()[r]) *
                     static_cast<double>(truth.basis(j).row(r).data<float>()[k]);
            }
            sum += static_cast<double>(mix.row(e).data<float>()[j]) * b;
          }
          for (int64_t i = 0; i < 4; ++i) {
            w.row(e * 4 + i).data<float>()[k] +=
                static_cast<float>(static_cast<double>(truth.a().row(e * 4 + i).data<float>()[m]) * silu(sum));
          }
        }
      }
    }
    EXPECT_NEAR(relative_error(truth, w, sizes), 0, 1e-10);
    fill(fit, 1);  // near the truth: A away from it
    for (int64_t i = 0; i < fit.a().numel(); ++i) fit.a().data<float>()[i] *= .5F + .1F * static_cast<float>(i % 7);
    const double start = relative_error(fit, w, sizes);
    const LatentFit::Errors errors = fit.fit(w, {.steps = 3000, .lr = .02});
    EXPECT_NEAR(errors.before, start, 1e-5);
    EXPECT_NEAR(errors.after, relative_error(fit, w, sizes), 1e-5);
    EXPECT_LT(errors.after, 1e-4);
  }
}

// The gradient of one step, seen through the step: with a tiny rate and Adam every number moves by the rate against the sign of its
// gradient; a step of plain descent along the numerical gradient says which sign.
TEST(LatentFit, MovesAgainstTheGradient) {
  const LatentFitSizes sizes{.latents = 2, .width = 3, .hidden = 5, .size = 3, .bases = 2, .rank = 1};
  const auto filled = [&] {
    auto fit = std::make_unique<LatentFit>(sizes);
    fit->a().copy_from(testing::random_tensor(fit->a().shape(), DType::kF32, 11));
    fit->logits().copy_from(testing::random_tensor(fit->logits().shape(), DType::kF32, 12));
    for (int64_t j = 0; j < 2; ++j) {
      fit->basis(j).copy_from(
          testing::random_tensor(fit->basis(j).shape(), DType::kF32, 13 + static_cast<uint64_t>(j)));
      fit->left(j).copy_from(testing::random_tensor(fit->left(j).shape(), DType::kF32, 15 + static_cast<uint64_t>(j)));
    }
    return fit;
  };
  const Tensor w = testing::random_tensor({6, 5}, DType::kF32, 17);
  const auto numbers = [](const LatentFit& fit) {
    return std::vector<Tensor>{fit.a(), fit.logits(), fit.basis(0), fit.basis(1), fit.left(0), fit.left(1)};
  };
  const auto before = filled(), moved = filled();
  moved->fit(w, {.steps = 1, .lr = 1e-4});
  int64_t checked = 0;
  for (size_t t = 0; t < 6; ++t) {
    for (int64_t i = 0; i < numbers(*before)[t].numel(); ++i) {
      const auto up = filled(), down = filled();
      constexpr float kStep = 1e-2F;
      numbers(*up)[t].data<float>()[i] += kStep;
      numbers(*down)[t].data<float>()[i] -= kStep;
      const double slope = (relative_error(*up, w, sizes) - relative_error(*down, w, sizes)) / (2 * kStep);
      if (std::abs(slope) < 1e-3) continue;
      ++checked;
      const double move =
          static_cast<double>(numbers(*moved)[t].data<float>()[i] - numbers(*before)[t].data<float>()[i]);
      EXPECT_LT(move * slope, 0) << "tensor " << t << ", number " << i;
    }
  }
  EXPECT_GT(checked, 30);
}

// 4 experts of 2 x 4: A 4*2*M, bases n M 4, mixes 4 n for each of gate and up; down 4*8 stays.
TEST(Mobe, SizesByHand) {
  TinyModel tiny(1, [](int64_t, int64_t e, ExpertMatrix, int64_t r, int64_t c) {
    return static_cast<float>(std::sin(static_cast<double>(7 * e + 3 * r + c)));
  });
  const ModelSize size = model_size(tiny.config);
  tiny.options.latent.fit_steps = 1;
  tiny.options.budget = {BudgetKind::kExperts, .25};  // 24 of 96 go: 40 for gate and up
  const Plan plan = tiny.plan("mobe");
  // n = 4 / 4 = 1: M = 1: 2 (8 + 4 + 4) = 32, M = 2: 2 (16 + 8 + 4) = 56 are too many.
  EXPECT_EQ(plan.layers[0].shape.latent_size, 1);
  EXPECT_EQ(plan.layers[0].shape.projections, 1);
  EXPECT_EQ(stored_parameters(plan.shapes(), size), size.total() - 96 + 32 + 32);
  EXPECT_EQ(plan.layers[0].shape.latent_projection, (std::vector<int32_t>{-1, -1, -1, -1}));
  tiny.options.latent.down = true;  // 72 for three: M = 2: 3 (16 + 8 + 4) = 84; M = 1: 3 (8 + 4 n + 4 n) with n = 2
  EXPECT_EQ(stored_parameters(tiny.plan("mobe").shapes(), size), size.total() - 96 + 72);
  tiny.options.latent.bases = 1;
  EXPECT_EQ(stored_parameters(tiny.plan("mobe").shapes(), size), size.total() - 96 + 48);
  tiny.options.latent.bases = 0, tiny.options.latent.size = 1;
  EXPECT_EQ(tiny.plan("mobe").layers[0].shape.projections, 2);
  tiny.options.latent.down = false, tiny.options.latent.size = 0;
  tiny.options.budget = {BudgetKind::kExperts, .5};  // 16 for gate and up
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"impossible for mobe", "down matrices stay", "% removed"},
                                  [&] { tiny.plan("mobe"); }));
  tiny.options.latent.size = 3;
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"--latent-size 3", "at most 2"}, [&] { tiny.plan("mobe"); }));
}

// n = 4 bases, M = 2: 3 (16 + 4 K (2 + 4 - K) + 16); K = 1: 3 (32 + 20) = 156 > 96, so M shrinks: M = 1: 3 (8 + 16 + 16) = 120 too; with
// n = 1 M = 2, K = 1: 3 (16 + 5 + 4) = 75.
TEST(Slbf, SizesByHand) {
  TinyModel tiny(1, [](int64_t, int64_t e, ExpertMatrix, int64_t r, int64_t c) {
    return static_cast<float>(std::sin(static_cast<double>(7 * e + 3 * r + c)));
  });
  const ModelSize size = model_size(tiny.config);
  tiny.options.latent.fit_steps = 1;
  tiny.options.budget = {BudgetKind::kExperts, .2};
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"impossible for slbf", "4 bases"}, [&] { tiny.plan("slbf"); }));
  tiny.options.latent.bases = 1;  // 76 allowed
  const Plan plan = tiny.plan("slbf");
  EXPECT_EQ(plan.layers[0].shape.latent_size, 2);
  EXPECT_EQ(plan.layers[0].shape.projection_rank, 1);
  EXPECT_EQ(stored_parameters(plan.shapes(), size), size.total() - 96 + 75);
}

// The published size of OLMoE: with K = 64 of M = 1024 the experts are 0.592 of what they were, with 256 0.844.
TEST(Slbf, PublishedSizes) {
  const OlmoeConfig config = *named_config("olmoe-1b-7b");
  const ModelSize size = model_size(config);
  for (const auto& [rank, share] : {std::pair<int64_t, double>{64, .592}, {128, .680}, {256, .844}}) {
    LayerShape shape;
    shape.latent_size = 1024, shape.projections = 64, shape.projection_rank = rank;
    shape.latent_down = shape.latent_mix = true;
    shape.latent_projection.assign(64, -1);
    const double made = static_cast<double>(stored_parameters(shape, size)) / static_cast<double>(64 * size.expert);
    EXPECT_NEAR(made, share, 5e-4) << rank;
  }
}

// The fit starts at the published start and lowers the error of the weights; written, loaded and densified it is what was fitted.
TEST(MixedLatents, FitLowersTheErrorOfTheWeights) {
  const CompressionGround& ground = CompressionGround::golden();
  const Checkpoint original(ground.model);
  const OlmoeConfig config = read_config(ground.model);
  const ExpertSource experts(original, config);
  for (const char* method : {"mobe", "slbf"}) {
    SCOPED_TRACE(method);
    double errors[2];
    const TempDir where;
    for (const int64_t steps : {1, 200}) {
      ground.compress(method, .25, where / "out", [&](MethodOptions& o) { o.latent.fit_steps = steps; });
      const OlmoeConfig made = read_config(where / "out");
      const Checkpoint files(where / "out");
      const auto shapes = slot_tables_from_json(parse_json(made.lightmoe_json, "config"), made, "config");
      LatentWeights latents(files, made, shapes);
      double sum = 0, whole = 0;
      for (int32_t e = 0; e < config.num_experts; ++e) {
        for (const ExpertMatrix matrix : kExpertMatrices) {
          const std::vector<double> w = testing::to_doubles(experts.place(0, e, matrix).read(DType::kF64)),
                                    v = testing::to_doubles(latents.matrix(0, e, matrix));
          for (size_t i = 0; i < w.size(); ++i) sum += (w[i] - v[i]) * (w[i] - v[i]), whole += w[i] * w[i];
        }
      }
      errors[steps > 1] = sum / whole;
    }
    EXPECT_LT(errors[1], .8 * errors[0]);
  }
}

const std::vector<std::string> kMixed = {"mobe", "slbf"};
void few_steps(MethodOptions& o) { o.latent.fit_steps = 20; }

TEST(MixedLatents, IdentityAtRatioZero) {
  for (const std::string& method : kMixed) testing::expect_identity_at_zero(method);
}
TEST(MixedLatents, BytesReallyFall) {
  for (const std::string& method : kMixed) testing::expect_bytes_saved(method, .25, 0, few_steps);
}
TEST(MixedLatents, ExportsTheSameFunction) {
  for (const std::string& method : kMixed) testing::expect_export_is_the_same(method, .25, few_steps);
}
// Adapters stay beside latents: what recovery saves is exported with them.
TEST(MixedLatents, ExportsWithAdaptersAsWell) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  ground.compress("slbf", .25, where / "out", few_steps);
  Recovery recovery(where / "out", ground.model, 1, {});
  uint64_t seed = 1;
  for (const Block& block : recovery.model().blocks) {
    for (const Adapter& a : block.moe.adapters) {
      for (const ParameterPtr& b : {a.b_gate, a.b_up, a.b_down})
        b->value.copy_from(testing::random_tensor(b->value.shape(), DType::kF32, seed++, .3));
    }
  }
  recovery.finish();
  std::filesystem::create_directories(where / "saved");
  recovery.save(where / "saved", DType::kF32, nullptr);
  export_to_hugging_face({.model = where / "saved", .output = where / "stock"});
  const std::vector<double> with = testing::to_doubles(ground.logits(where / "saved"));
  EXPECT_FALSE(testing::close(ground.logits(where / "out"), with, 1e-3));
  EXPECT_TRUE(testing::close(ground.logits(where / "stock"), with, 2e-5));
}
TEST(MixedLatents, Recover) { testing::expect_recovers("slbf", .25, 1 << 20, few_steps); }
TEST(MixedLatents, DemoLoss) {
  const auto steps = [](MethodOptions& o) { o.latent.fit_steps = 30; };
  for (const std::string& method : kMixed) testing::expect_useful_on_demo(method, steps);
}

// What the planner says is what is loaded; a token multiplies with its latents' mixes, not with the bases.
TEST(MixedLatents, FootprintAndSummary) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  ground.compress("slbf", .25, where / "out", few_steps);
  const ModelSummary summary = summarize_model(where / "out");
  const OlmoeConfig& c = summary.config;
  const Footprint f = plan_footprint(c, summary.slot_tables, {.stored = DType::kF32, .context = 0});
  const auto model = load_model(where / "out", DType::kF32);
  EXPECT_EQ(f.parameters, model->num_parameters());
  EXPECT_EQ(f.stored_bytes, summary.total.bytes);
  EXPECT_EQ(f.active_parameters, summary.active_parameters);
  const LayerSummary& layer = summary.layers[0];
  EXPECT_TRUE(layer.latent_mix && layer.latent_down);
  const int64_t k = c.num_experts_per_token, m = layer.latent_size, n = layer.projections, d = c.hidden_size;
  const int64_t own = k * 3 * (c.intermediate_size * m + n), shared = n * layer.projection_parameters;
  EXPECT_EQ(summary.active_parameters - model_size(c).rest, c.num_layers * (own + shared));
  const Footprint stock = plan_footprint(c, {}, {.context = 0});
  EXPECT_EQ(stock.flops_per_token - f.flops_per_token,
            2 * c.num_layers * (k * 3 * c.intermediate_size * d - k * 3 * (c.intermediate_size * m + m * d)));
}

// Groups of two, factorised down matrices: exact where the rows of each group span few directions.
TEST(MolaeOptions, GroupsAndDown) {
  const auto weights = [](int64_t, int64_t expert, ExpertMatrix matrix, int64_t row, int64_t column) {
    const bool down = matrix == ExpertMatrix::kDown;
    const int64_t unit = down ? column : row, other = down ? row : column;
    constexpr double kDirections[2][4] = {{1, 2, 0, -1}, {0, 1, 1, 3}};  // of experts 0, 1 and of 2, 3
    return static_cast<float>(static_cast<double>(1 + expert + 2 * unit) * kDirections[expert / 2][other]);
  };
  TinyModel tiny(1, weights);
  const ModelSize size = model_size(tiny.config);
  tiny.options.budget = {BudgetKind::kExperts, .5};
  tiny.options.latent.group = 2, tiny.options.latent.down = true, tiny.options.latent.size = 1;
  const Plan plan = tiny.plan("molae");
  EXPECT_EQ(plan.layers[0].shape.projections, 2);
  EXPECT_EQ(plan.layers[0].shape.latent_projection, (std::vector<int32_t>{0, 0, 1, 1}));
  // Three matrices: two projections of 4 and four factors of 2 each.
  EXPECT_EQ(stored_parameters(plan.shapes(), size), size.total() - 96 + 3 * (2 * 4 + 4 * 2));
  for (const ExpertMatrix matrix : kExpertMatrices) {
    for (int64_t e = 0; e < 4; ++e) {
      const Tensor made = product(plan.computed.at(latent_tensor_name(0, e, matrix))(), false,
                                  plan.computed.at(projection_tensor_name(0, e / 2, matrix))(), false);
      const Tensor w = tiny.experts->place(0, e, matrix).read(DType::kF64);
      EXPECT_TRUE(testing::close(made, testing::to_doubles(matrix == ExpertMatrix::kDown ? transpose(w) : w), 1e-12));
    }
  }
  tiny.options.latent.size = 3;  // 3 (2*4*3 + 4*2*3) = 144: more than there was
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"impossible for molae", "latent space of 3"},
                                  [&] { tiny.plan("molae"); }));
  tiny.options.latent.size = 1, tiny.options.latent.group = 5;
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"--latent-group 5", "4 experts"}, [&] { tiny.plan("molae"); }));
  tiny.options.latent.group = LatentOptions().group;  // 8: one group of all four
  EXPECT_EQ(tiny.plan("molae").layers[0].shape.projections, 1);
}

void with_down(MethodOptions& o) { o.latent.down = true, o.latent.group = 16; }
TEST(MolaeOptions, BytesReallyFall) {
  testing::expect_bytes_saved("molae", .5, 0, with_down);
  testing::expect_bytes_saved("molae-whitened", .5, 0, with_down);
}
TEST(MolaeOptions, ExportsTheSameFunction) {
  testing::expect_export_is_the_same("molae", .5, with_down);
  testing::expect_export_is_the_same("molae-whitened", .5, with_down);
}

// On the inputs that occur the whitened factors of the down matrices lose less of the outputs.
TEST(MolaeOptions, WhitenedDownServesTheOutputs) {
  const CompressionGround& ground = CompressionGround::demo();
  const OlmoeConfig config = read_config(ground.model);
  const Checkpoint checkpoint(ground.model);
  const ExpertSource experts(checkpoint, config);
  MethodOptions options;
  options.budget = {BudgetKind::kExperts, .4};
  options.latent.down = true;
  const MethodInput input{.config = config, .statistics = ground.statistics, .options = options, .experts = &experts};
  double errors[2] = {0, 0};
  for (const bool whitened : {false, true}) {
    const Plan plan = find_method(whitened ? "molae-whitened" : "molae").plan(input);
    for (int32_t e = 0; e < 8; ++e) {
      const Tensor x = routed_rows(layer_sample(input, 0), {e}).to(DType::kF64);
      const ExpertMatrices expert = read_expert(experts, 0, e, DType::kF64);
      const Tensor hidden = expert_hidden(expert, x), y = expert_output(expert, hidden);
      const Tensor w = transpose(product(plan.computed.at(latent_tensor_name(0, e, ExpertMatrix::kDown))(), false,
                                         plan.computed.at(projection_tensor_name(0, 0, ExpertMatrix::kDown))(), false));
      const std::vector<double> made = testing::to_doubles(product(hidden, false, w, true)),
                                wanted = testing::to_doubles(y);
      for (size_t i = 0; i < made.size(); ++i) errors[whitened] += (made[i] - wanted[i]) * (made[i] - wanted[i]);
    }
  }
  EXPECT_LT(errors[1], errors[0]);
}

}  // namespace
}  // namespace lightmoe
