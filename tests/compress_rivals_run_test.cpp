// One recipe with a pruning, a merging, a latent and a constant method: calibrated once with what they need, compressed, trained,
// evaluated.

#include <gtest/gtest.h>

#include "compress/runner.h"
#include "compress/statistics.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

TEST(RivalsRun, EveryKindOfSlotThroughARecipe) {
  const testing::TempDir where;
  const std::string ids = "tests/golden/e64k8/golden.safetensors";
  testing::put_file(where / "recipe.toml",
                    "[recipe]\nmodel = \"tests/golden/e64k8\"\noutput = \"" + (where / "out").string() +
                        "\"\nmethods = [\"reap\", \"hc-smoe\", \"molae-whitened\", \"mone\", \"conmoe-2\"]\n"
                        "ratios = [0.2]\nspeed = false\n[compress]\nrank = 2\nbases = 2\n"
                        "[train]\nrows = 1\nlength = 40\nlr = 1e-3\nsteps = 2\n"
                        "[[task]]\nname = \"ids\"\ntrain = \"" +
                        ids + "\"\ntest = \"" + ids + "\"\n");
  const Recipe recipe = read_recipe((where / "recipe.toml").string(), false);
  EXPECT_NE(describe(recipe).find("molae-whitened"), std::string::npos);
  run_calibration(recipe, {});
  EXPECT_TRUE(run_stages(recipe, {}, nullptr));
  const std::vector<RunResult> results = load_results(recipe);
  ASSERT_EQ(results.size(), 5u);
  for (const RunResult& result : results) {
    EXPECT_EQ(result.steps, 2) << result.method;
    EXPECT_LT(result.parameters, result.original_parameters) << result.method;
    EXPECT_EQ(result.file_bytes, result.live_bytes) << result.method;
  }
  const Statistics statistics = load_statistics(where / "out" / "ids" / "statistics.safetensors");
  EXPECT_FALSE(statistics.layers[0].all_output.empty());
  EXPECT_FALSE(statistics.layers[0].sample_inputs.empty());
  for (const char* method : {"reap", "hc-smoe", "molae-whitened", "mone", "conmoe-2"}) {
    const std::filesystem::path model = where / "out" / "ids" / (std::string(method) + "-r20-s1") / "model";
    EXPECT_TRUE(std::filesystem::exists(model / "config.json")) << method;
  }
}

}  // namespace
}  // namespace lightmoe
