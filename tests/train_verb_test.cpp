// `lightmoe train` as a user runs it, on a golden model.

#include "loaders/output.h"
#include "tests/support/files.h"
#include "tests/support/program.h"

namespace fs = std::filesystem;

namespace lightmoe {
namespace {

using testing::get_file;
using testing::run_lightmoe;
using testing::TempDir;

std::vector<std::string> arguments(const fs::path& out, const std::vector<std::string>& more) {
  const std::string model = "tests/golden/plain";
  std::vector<std::string> all = {"train",        model,       "--tokens",     model + "/golden.safetensors",
                                  "--steps",      "6",         "--length",     "16",
                                  "--batch-rows", "2",         "--accumulate", "2",
                                  "--lr",         "1e-2",      "--threads",    "1",
                                  "--out",        out.string()};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

TEST(TrainVerb, WritesAModelAndResumesBitForBit) {
  TempDir directory;
  const auto whole = run_lightmoe(arguments(directory / "whole", {}));
  ASSERT_EQ(whole.exit_code, 0) << whole.err;
  EXPECT_NE(whole.out.find("6 steps, loss "), std::string::npos) << whole.out;
  EXPECT_TRUE(is_complete(directory / "whole", true));
  EXPECT_FALSE(fs::exists(directory / "whole.checkpoints"));
  EXPECT_NE(get_file(directory / "whole/training.json").find("\"steps\": 6"), std::string::npos);
  EXPECT_NE(get_file(directory / "whole.log.jsonl").find("\"step\":6"), std::string::npos);

  // A machine that dies after step 4: the final model is not there, the last checkpoint is.
  const std::vector<std::string> parts = {"--save-every", "2", "--resume", "auto"};
  ASSERT_EQ(run_lightmoe(arguments(directory / "parts", parts)).exit_code, 0);
  fs::remove_all(directory / "parts");
  fs::remove_all(directory / "parts.checkpoints/step-00000006");
  const auto resumed = run_lightmoe(arguments(directory / "parts", parts));
  ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
  EXPECT_NE(resumed.err.find("resumed after step 4"), std::string::npos) << resumed.err;
  EXPECT_EQ(get_file(directory / "parts/model.safetensors"), get_file(directory / "whole/model.safetensors"));
  // A checkpoint is a model directory too.
  EXPECT_EQ(get_file(directory / "parts.checkpoints/step-00000006/model.safetensors"),
            get_file(directory / "whole/model.safetensors"));

  std::vector<std::string> other = parts;
  other.insert(other.end(), {"--clip", "0.5", "--force"});
  const auto refused = run_lightmoe(arguments(directory / "parts", other));
  EXPECT_EQ(refused.exit_code, 7) << refused.err;
  EXPECT_NE(refused.err.find("clip: 1, now 0.5"), std::string::npos) << refused.err;
  EXPECT_EQ(get_file(directory / "parts/model.safetensors"), get_file(directory / "whole/model.safetensors"));
}

// In bf16 the f32 master weights are part of the state: a run that lost them would go on from rounded ones.
TEST(TrainVerb, ResumesBF16BitForBit) {
  TempDir directory;
  const std::vector<std::string> bf16 = {"--dtype", "bf16", "--save-every", "3", "--resume", "auto"};
  ASSERT_EQ(run_lightmoe(arguments(directory / "whole", bf16)).exit_code, 0);
  ASSERT_EQ(run_lightmoe(arguments(directory / "parts", bf16)).exit_code, 0);
  fs::remove_all(directory / "parts");
  fs::remove_all(directory / "parts.checkpoints/step-00000006");
  const auto resumed = run_lightmoe(arguments(directory / "parts", bf16));
  ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
  EXPECT_NE(resumed.err.find("resumed after step 3"), std::string::npos) << resumed.err;
  const std::string state = "step-00000006/optimizer.safetensors";
  EXPECT_EQ(get_file(directory / "parts.checkpoints" / state), get_file(directory / "whole.checkpoints" / state));
  EXPECT_NE(get_file(directory / "whole.checkpoints" / state).find("\"master.model.norm.weight\""), std::string::npos);
}

TEST(TrainVerb, EvaluatesAndTrainsOnlyWhatIsAsked) {
  TempDir directory;
  const auto result = run_lightmoe(arguments(
      directory / "out",
      {"--eval-data", "tests/golden/plain/golden.safetensors", "--eval-every", "3", "--train-only", "*.mlp.*",
       "--freeze", "*.mlp.gate.weight", "--trace", (directory / "trace.json").string(), "--recompute", "moe"}));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_NE(result.out.find("eval loss"), std::string::npos) << result.out;
  EXPECT_NE(result.err.find("step 3: eval loss"), std::string::npos) << result.err;
  const std::string trace = get_file(directory / "trace.json");
  for (const char* name :
       {"\"step\"", "\"data\"", "\"forward\"", "\"backward\"", "\"optimizer\"", "\"save\"", "\"evaluate\""}) {
    EXPECT_NE(trace.find(name), std::string::npos) << name;
  }
  EXPECT_NE(get_file(directory / "out.log.jsonl").find("\"event\":\"eval\""), std::string::npos);
}

TEST(TrainVerb, DryRunWritesNothing) {
  TempDir directory;
  const auto result = run_lightmoe(arguments(directory / "out", {"--dry-run"}));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  for (const char* word : {"weights", "gradients", "optimizer", "activations", "together about", "6 of 64 tokens"}) {
    EXPECT_NE(result.out.find(word), std::string::npos) << word << "\n" << result.out;
  }
  EXPECT_TRUE(fs::is_empty(directory.path()));
}

TEST(TrainVerb, MistakesAreRefusedBeforeAnyWork) {
  TempDir directory;
  const auto refused = [&](int code, const std::string& piece, const std::vector<std::string>& more) {
    const auto result = run_lightmoe(arguments(directory / "out", more));
    EXPECT_NE(result.err.find(piece), std::string::npos) << result.err;
    EXPECT_TRUE(fs::is_empty(directory.path())) << piece;
    return result.exit_code == code;
  };
  EXPECT_TRUE(refused(2, "--schedule cosin", {"--schedule", "cosin"}));
  EXPECT_TRUE(refused(2, "--warmup 9", {"--warmup", "9"}));
  EXPECT_TRUE(refused(2, "either --data or --tokens", {"--data", "x.jsonl"}));
  EXPECT_TRUE(refused(2, "did you mean", {"--freeze", "model.embed_token.weight"}));
  EXPECT_TRUE(refused(2, "--eval-every needs --eval-data", {"--eval-every", "2"}));
  EXPECT_TRUE(refused(2, "--eps 0", {"--eps", "0"}));
  EXPECT_TRUE(refused(3, "nothing.safetensors", {"--eval-data", "nothing.safetensors"}));
}

}  // namespace
}  // namespace lightmoe
