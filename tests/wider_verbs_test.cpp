// The verbs plan, prefetch, tensor-fit, merge and blend, and inspect --diversity, as a user calls them.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "loaders/safetensors.h"
#include "tests/support/program.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::ProgramResult;
using testing::run_lightmoe;

const char* const kModel = "tests/golden/e64k8";
const char* const kTokens = "tests/golden/e64k8/golden.safetensors";

::testing::AssertionResult says(const ProgramResult& r, const std::string& words) {
  if (r.exit_code != 0) return ::testing::AssertionFailure() << "exit " << r.exit_code << ": " << r.err;
  if (r.out.find(words) == std::string::npos)
    return ::testing::AssertionFailure() << "lacks " << words << ": " << r.out;
  return ::testing::AssertionSuccess();
}
::testing::AssertionResult refused(const ProgramResult& r, int code) {
  if (r.exit_code == code && std::count(r.err.begin(), r.err.end(), '\n') == 1) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "exit " << r.exit_code << ": " << r.err;
}

TEST(WiderVerbs, Plan) {
  EXPECT_TRUE(says(run_lightmoe({"plan", "olmoe-1b-7b"}), "6.919 B"));
  EXPECT_TRUE(says(run_lightmoe({"plan", "olmoe-1b-7b", "--experts", "32", "--train-tokens", "4096"}), "FLOP/token"));
  EXPECT_TRUE(says(run_lightmoe({"plan", kModel, "--json"}), "\"parameters\""));
  EXPECT_TRUE(refused(run_lightmoe({"plan", "olmoe-1b-7b", "--sections", "7"}), 2));
  EXPECT_TRUE(refused(run_lightmoe({"plan", "olmoe-1b-7b", "--stored", "f16"}), 2));
  EXPECT_TRUE(refused(run_lightmoe({"plan", "absent"}), 3));
}

TEST(WiderVerbs, Prefetch) {
  EXPECT_TRUE(says(run_lightmoe({"prefetch", kModel, "--tokens", kTokens, "--predict", "8", "16"}), "16"));
  EXPECT_TRUE(refused(run_lightmoe({"prefetch", kModel, "--tokens", kTokens, "--ahead", "99"}), 2));
}

TEST(WiderVerbs, TensorFit) {
  EXPECT_TRUE(says(run_lightmoe({"tensor-fit", kModel, "--rank", "2", "--sweeps", "2"}), "relative error"));
  EXPECT_TRUE(refused(run_lightmoe({"tensor-fit", kModel, "--form", "tucker"}), 2));
  EXPECT_TRUE(refused(run_lightmoe({"tensor-fit", kModel, "--layer", "99"}), 2));
}

TEST(WiderVerbs, MergeAndBlend) {
  const testing::ScratchDirectory scratch;
  const std::string out = scratch.path() / "merged";
  EXPECT_EQ(run_lightmoe({"merge", kModel, kModel, "-o", out}).exit_code, 0);
  // The mean of a model and itself is the model.
  const SafetensorsFile merged(scratch.path() / "merged/model.safetensors"),
      original(std::string(kModel) + "/model.safetensors");
  for (const TensorInfo& info : original.tensors()) {
    EXPECT_TRUE(testing::bits_equal(merged.read(info.name), original.read(info.name))) << info.name;
  }
  EXPECT_TRUE(refused(run_lightmoe({"merge", kModel, kModel, "-o", out}), 2)) << "exists";
  EXPECT_TRUE(refused(run_lightmoe({"merge", kModel, kModel, "--rule", "ties", "-o", out + "2"}), 2)) << "needs a base";
  EXPECT_FALSE(std::filesystem::exists(out + "2"));
}

TEST(WiderVerbs, Diversity) { EXPECT_TRUE(says(run_lightmoe({"inspect", kModel, "--diversity"}), "cosine")); }

}  // namespace
}  // namespace lightmoe
