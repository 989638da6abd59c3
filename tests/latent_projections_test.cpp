// Mixed projections in blocks of rows: whatever a block holds, P, the gradients of bases and mixes are the same.

#include "model/latent_projections.h"

#include "kernels/elementwise.h"
#include "tests/support/devices.h"
#include "tests/support/moe_layers.h"

namespace lightmoe {
namespace {

using testing::to_doubles;

constexpr int64_t kHidden = 6, kSize = 5;

MoeLayer mixed_layer(int64_t rank) {
  return testing::make_layer({.name = "",
                              .hidden = kHidden,
                              .width = 4,
                              .expert_of_slot = {-1, -1, -1},
                              .projection_of_slot = {0, 0, 0},
                              .latent_size = kSize,
                              .latent_down = true,
                              .mix_of = 2,
                              .projection_rank = rank},
                             DType::kF64, DType::kF64, 3);
}

// A plan in which latents 0 and 2 have rows and 1 has none.
DispatchPlan plan_of() { return {.group_offsets = Tensor::from<int32_t>({0, 2, 2, 3}, {4})}; }

// P of a half, [rows of all blocks, D] per latent, and with gradients for dP = 1, 2, 3, .. over the rows of each latent.
struct Seen {
  std::vector<std::vector<double>> p{3};
  std::vector<int64_t> firsts;
  std::vector<std::vector<double>> gradients;
};
Seen walk(const MoeLayer& layer, ExpertHalf half, int64_t block_rows) {
  // One row of a block: two latents or two bases, D numbers each.
  const LatentProjections projections(layer, block_rows * 2 * kHidden * 8);
  for (const ParameterPtr& parameter : layer.parameters()) parameter->zero_grad();
  Seen seen;
  projections.use(half, plan_of(), DType::kF64, true, [&](const LatentProjections::Block& block) {
    seen.firsts.push_back(block.first);
    EXPECT_FALSE(block.p[1].defined() || block.dp[1].defined());
    for (const size_t g : {0u, 2u}) {
      const std::vector<double> rows = to_doubles(block.p[g]);
      seen.p[g].insert(seen.p[g].end(), rows.begin(), rows.end());
      for (int64_t i = 0; i < block.dp[g].numel(); ++i) {
        block.dp[g].data<double>()[i] = static_cast<double>(block.first * kHidden + i) * (g == 0 ? 1 : -.5);
      }
    }
  });
  for (const ParameterPtr& parameter : layer.parameters()) {
    seen.gradients.push_back(to_doubles(parameter->ensure_grad()));
  }
  return seen;
}

TEST(LatentProjections, BlocksChangeNothing) {
  for (const int64_t rank : {0, 2}) {
    const MoeLayer layer = mixed_layer(rank);
    for (const ExpertHalf half : {ExpertHalf::kGateUp, ExpertHalf::kDown}) {
      const Seen whole = walk(layer, half, 100);
      EXPECT_EQ(whole.firsts, (half == ExpertHalf::kDown ? std::vector<int64_t>{0} : std::vector<int64_t>{0, kSize}));
      for (const int64_t rows : {1, 2, 3, 4}) {
        SCOPED_TRACE(::testing::Message() << "rank " << rank << ", blocks of " << rows);
        const Seen parts = walk(layer, half, rows);
        EXPECT_EQ(parts.firsts.size(), whole.firsts.size() * static_cast<size_t>((kSize + rows - 1) / rows));
        for (const size_t g : {0u, 2u}) {
          ASSERT_EQ(parts.p[g].size(), whole.p[g].size());
          for (size_t i = 0; i < whole.p[g].size(); ++i) EXPECT_NEAR(parts.p[g][i], whole.p[g][i], 1e-14);
        }
        for (size_t i = 0; i < whole.gradients.size(); ++i) {
          for (size_t k = 0; k < whole.gradients[i].size(); ++k) {
            EXPECT_NEAR(parts.gradients[i][k], whole.gradients[i][k], 1e-11);
          }
        }
      }
    }
  }
}

// Two bases of one number each, mixed half and half: P = silu((2 + 4) / 2) = 3 sigma(3); dP = 1 gives dM = silu'(3), which both bases get by
// halves and the coefficients times 2 and 4.
TEST(LatentProjections, ByHand) {
  const auto number = [](std::vector<double> values, const Shape& shape) {
    auto p = std::make_shared<Parameter>();
    p->value = Tensor::from(values, shape);
    return p;
  };
  MoeLayer layer{.router = number({0}, {1, 1})};
  layer.projections = {{.gate_up = number({2, 0}, {2, 1})}, {.gate_up = number({4, 0}, {2, 1})}};
  layer.latents = {{.a_gate = number({1}, {1, 1}),
                    .a_up = number({1}, {1, 1}),
                    .down = number({1}, {1, 1}),
                    .mix = number({.5, .5, 1, 1}, {2, 2})}};
  const DispatchPlan plan{.group_offsets = Tensor::from<int32_t>({0, 1}, {2})};
  std::vector<double> p;
  LatentProjections(layer).use(ExpertHalf::kGateUp, plan, DType::kF64, true,
                               [&](const LatentProjections::Block& block) {
                                 p.push_back(block.p[0].data<double>()[0]);
                                 block.dp[0].data<double>()[0] = block.first == 0 ? 1 : 0;
                               });
  const double sigma = 1 / (1 + std::exp(-3.0)), slope = sigma + 3 * sigma * (1 - sigma);
  ASSERT_EQ(p.size(), 2u);
  EXPECT_NEAR(p[0], 3 * sigma, 1e-15);
  EXPECT_EQ(p[1], 0);
  for (const size_t j : {0u, 1u}) {
    EXPECT_NEAR(layer.projections[j].gate_up->ensure_grad().data<double>()[0], slope / 2, 1e-15);
    EXPECT_EQ(layer.projections[j].gate_up->ensure_grad().data<double>()[1], 0);
  }
  const std::vector<double> mix = to_doubles(layer.latents[0].mix->ensure_grad());
  EXPECT_NEAR(mix[0], 2 * slope, 1e-15);
  EXPECT_NEAR(mix[1], 4 * slope, 1e-15);
}

// The whole of a layer's scratch is a few blocks, and nothing of it stays.
TEST(LatentProjections, ScratchIsBounded) {
  const MoeLayer layer = mixed_layer(2);
  for (const ParameterPtr& parameter : layer.parameters()) parameter->trainable = false;
  const int64_t row = 2 * kHidden * 8, before = memory_use(MemoryCategory::kScratch).live_bytes;
  int64_t live = 0;
  LatentProjections(layer, 2 * row)
      .use(ExpertHalf::kGateUp, plan_of(), DType::kF64, false, [&](const LatentProjections::Block&) {
        live = std::max(live, memory_use(MemoryCategory::kScratch).live_bytes - before);
      });
  EXPECT_GT(live, 0);
  EXPECT_LE(live, 3 * 2 * row + 512);  // sums, P, bases; the coefficients
  EXPECT_EQ(memory_use(MemoryCategory::kScratch).live_bytes, before);
}

}  // namespace
}  // namespace lightmoe
