#include "model/parameter_table.h"

#include <gtest/gtest.h>

#include "loaders/safetensors.h"
#include "model/random_weights.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

TEST(ParameterTable, ListsExactlyTheTensorsOfGoldenFolders) {
  for (const std::string base : {"plain", "gqa-clip-renorm", "e64k8"}) {
    for (const ExpertLayout layout : {ExpertLayout::kPerExpert, ExpertLayout::kFused}) {
      const std::string folder = "tests/golden/" + base + (layout == ExpertLayout::kFused ? "-fused" : "");
      SCOPED_TRACE(folder);
      const Checkpoint checkpoint(folder);
      const auto parameters = stock_parameters(read_config(folder), layout);
      EXPECT_EQ(parameters.size(), checkpoint.names().size());
      for (const ParameterInfo& p : parameters) EXPECT_EQ(checkpoint.info(p.name).shape, p.shape) << p.name;
    }
  }
}

TEST(ParameterTable, CountsThePublishedOlmoe) {
  int64_t total = 0;
  const auto parameters = stock_parameters(*named_config("olmoe-1b-7b"));
  for (const ParameterInfo& p : parameters) total += p.numel();
  EXPECT_EQ(parameters.size(), 3219u);  // 16 layers of 9 + 3 * 64 tensors, and 3
  EXPECT_EQ(total, 6'919'161'856);      // the published 6.92 B
}

TEST(RandomWeights, DependOnSeedAndNameOnly) {
  const OlmoeConfig config = *named_config("tiny");
  const Tensor a = Tensor::empty({31, 7}, DType::kF32), b = Tensor::empty({31, 7}, DType::kF32);
  fill_random_weight(config, "model.layers.0.mlp.gate.weight", 1, a);
  fill_random_weight(config, "model.layers.0.mlp.gate.weight", 1, b);
  EXPECT_TRUE(testing::bits_equal(a, b));
  for (const auto& [name, seed] :
       {std::pair{"model.layers.1.mlp.gate.weight", 1}, {"model.layers.0.mlp.gate.weight", 2}}) {
    fill_random_weight(config, name, static_cast<uint64_t>(seed), b);
    EXPECT_FALSE(testing::bits_equal(a, b));
  }
  double squares = 0;
  for (const double v : testing::to_doubles(a)) squares += v * v;
  EXPECT_NEAR(std::sqrt(squares / 217), 0.02, 0.003);  // three standard errors of 217 values
  fill_random_weight(config, "model.layers.0.self_attn.q_norm.weight", 1, b);
  for (const double v : testing::to_doubles(b)) EXPECT_EQ(v, 1);
}

}  // namespace
}  // namespace lightmoe
