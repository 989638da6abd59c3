// The program as a whole: usage errors, configuration files, environment. Verbs have tests of their own.

#include "tests/support/program.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>

#include "loaders/safetensors.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

using testing::ProgramOptions;
using testing::ProgramResult;
using testing::run_lightmoe;

::testing::AssertionResult fails_with(const ProgramResult& result, int code, const std::string& words) {
  if (result.exit_code != code) {
    return ::testing::AssertionFailure() << "exit " << result.exit_code << ", expected " << code << ": " << result.err;
  }
  if (std::count(result.err.begin(), result.err.end(), '\n') != 1) {
    return ::testing::AssertionFailure() << "not one line on stderr: " << result.err;
  }
  if (result.err.find(words) == std::string::npos) {
    return ::testing::AssertionFailure() << "stderr lacks \"" << words << "\": " << result.err;
  }
  return ::testing::AssertionSuccess();
}

const char* const kGolden = "tests/golden/plain";

TEST(Program, HelpAndVersionAnswer) {
  EXPECT_EQ(run_lightmoe({"--help"}).exit_code, 0);
  EXPECT_NE(run_lightmoe({"--help"}).out.find("inspect"), std::string::npos);
  EXPECT_EQ(run_lightmoe({"--version"}).out.rfind("lightmoe ", 0), 0u);
  EXPECT_EQ(run_lightmoe({}).exit_code, 2);
  EXPECT_NE(run_lightmoe({"inspect", "--help"}).out.find("Example:"), std::string::npos);
}

TEST(Program, MistypedNamesAreAnsweredWithTheNearest) {
  EXPECT_TRUE(fails_with(run_lightmoe({"inpsect"}), 2, "did you mean inspect?"));
  EXPECT_TRUE(fails_with(run_lightmoe({"inspect", kGolden, "--tensor"}), 2, "did you mean --tensors?"));
  // The misspelt option is named, not the required one that it was meant to be.
  EXPECT_TRUE(
      fails_with(run_lightmoe({"train", kGolden, "--stepz", "3"}), 2, "unknown option --stepz; did you mean --steps?"));
  EXPECT_TRUE(fails_with(run_lightmoe({"inspect", kGolden, "second"}), 2, "unexpected argument second"));
  EXPECT_TRUE(fails_with(run_lightmoe({"inspect", kGolden, "--gemm", "nativ"}), 2, "reference"));
  EXPECT_TRUE(fails_with(run_lightmoe({"inspect"}), 2, "model"));
}

TEST(Program, TensorsNotUsedAreWarnedOfAndRefusedWhenStrict) {
  const testing::ScratchDirectory scratch;
  const std::filesystem::path model = scratch.path() / "model";
  std::filesystem::copy(kGolden, model);
  const SafetensorsFile file(std::string(kGolden) + "/model.safetensors");
  std::vector<std::pair<std::string, Tensor>> tensors{{"extra", Tensor::zeros({2}, DType::kF32)}};
  for (const TensorInfo& info : file.tensors()) tensors.emplace_back(info.name, file.read(info.name));
  write_safetensors(model / "model.safetensors", tensors);
  const std::vector<std::string> generate = {
      "generate", model.string(), "--tokens", model / "golden.safetensors", "--max-new-tokens", "1"};
  const ProgramResult warned = run_lightmoe(generate);
  EXPECT_EQ(warned.exit_code, 0) << warned.err;
  EXPECT_NE(warned.err.find("1 tensors not used, the first is extra"), std::string::npos) << warned.err;
  std::vector<std::string> strict = generate;
  strict.push_back("--strict");
  EXPECT_TRUE(fails_with(run_lightmoe(strict), 3, "1 tensor not expected: extra"));
}

TEST(Program, ConfigFilesAreCheckedAndFlagsWin) {
  const testing::ScratchDirectory scratch;
  const std::string path = (scratch.path() / "c.toml").string();
  std::ofstream(path) << "threads = 1\n[inspect]\njson = true\n[train]\nsteps = 3\n";
  const ProgramResult printed =
      run_lightmoe({"inspect", kGolden, "--config", path, "--threads", "2", "--print-config"});
  EXPECT_EQ(printed.exit_code, 0) << printed.err;
  EXPECT_NE(printed.out.find("threads = 2"), std::string::npos) << printed.out;
  EXPECT_NE(printed.out.find("json = true"), std::string::npos) << printed.out;
  EXPECT_NE(printed.out.find("model = \"tests/golden/plain\""), std::string::npos) << printed.out;
  std::ofstream(path) << printed.out;  // what it prints, it reads: the positional argument, too
  EXPECT_EQ(run_lightmoe({"inspect", "--config", path}).out, run_lightmoe({"inspect", kGolden, "--json"}).out);
  EXPECT_EQ(run_lightmoe({"inspect", "no/such/model", "--config", path}).exit_code, 3);  // the command line wins
  std::ofstream(path) << "thread = 1\n";
  EXPECT_TRUE(fails_with(run_lightmoe({"inspect", kGolden, "--config", path}), 2, "did you mean threads?"));
  std::ofstream(path) << "threads = = 1\n";
  EXPECT_TRUE(fails_with(run_lightmoe({"inspect", kGolden, "--config", path}), 2, "c.toml:1:"));
}

TEST(Program, DevicesThatAreNotThereAreNamed) {
  EXPECT_TRUE(fails_with(run_lightmoe({"inspect", kGolden, "--device", "cuda"}), 9, "cuda"));
  EXPECT_TRUE(fails_with(run_lightmoe({"inspect", kGolden, "--device", "gpu"}), 2, "expected cpu, sim or cuda"));
}

TEST(Program, ErrorsAsJson) {
  const ProgramResult result = run_lightmoe({"inspect", "no/such/model", "--log-json"});
  EXPECT_TRUE(fails_with(result, 3, "{\"error\":{\"code\":3,"));
}

TEST(Program, WorksInAnyEnvironment) {
  const std::string expected = run_lightmoe({"inspect", kGolden, "--json"}).out;
  EXPECT_FALSE(expected.empty());
  for (const char* entry : {"LC_ALL=de_DE.UTF-8", "LC_NUMERIC=fr_FR", "HOME=", "TMPDIR=/nonexistent"}) {
    const ProgramResult result = run_lightmoe({"inspect", kGolden, "--json"}, {.environment = {entry}});
    EXPECT_EQ(result.exit_code, 0) << entry << result.err;
    EXPECT_EQ(result.out, expected) << entry;
  }
  ProgramOptions closed;
  closed.close_stdout = true;
  const int code = run_lightmoe({"inspect", kGolden}, closed).exit_code;
  EXPECT_TRUE(code == 0 || code == 4) << code;
}

}  // namespace
}  // namespace lightmoe
