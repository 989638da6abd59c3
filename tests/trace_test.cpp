// Ranges for Nsight, told to a recorder in its place (tests/plugins/nvtx_recorder.c), and steps that are chosen.

#include "runtime/trace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <sstream>

#include "runtime/error.h"
#include "tests/support/files.h"
#include "tests/support/program.h"

namespace lightmoe {
namespace {

using testing::ProgramResult;
using testing::run_lightmoe;

const std::vector<std::string> kGenerate = {
    "generate", "demo/base", "--prompt", "1 + 1 =", "--max-new-tokens", "3", "--ignore-eos"};

std::vector<std::string> lines_of(const std::filesystem::path& file) {
  std::istringstream text(testing::get_file(file));
  std::vector<std::string> lines;
  for (std::string line; std::getline(text, line);) lines.push_back(line);
  return lines;
}
int64_t count(const std::vector<std::string>& lines, const std::string& begin) {
  return std::count_if(lines.begin(), lines.end(), [&](const std::string& l) { return l.rfind(begin, 0) == 0; });
}

// What the recorder heard of a short generation.
std::vector<std::string> recorded(std::vector<std::string> arguments, const std::filesystem::path& file) {
  const ProgramResult r =
      run_lightmoe(arguments, {.environment = {"NVTX_INJECTION64_PATH=" + testing::plugin_path("nvtx_recorder"),
                                               "LIGHTMOE_TEST_NVTX=" + file.string()}});
  EXPECT_EQ(r.exit_code, 0) << r.err;
  return lines_of(file);
}

TEST(Nvtx, RangesHaveADomainCategoriesRegisteredNamesAndPayloads) {
  if (!nvtx_available()) GTEST_SKIP() << "no NVTX headers here";
  const testing::ScratchDirectory scratch;
  const std::vector<std::string> lines = recorded(kGenerate, scratch.path() / "nvtx.txt");
  ASSERT_FALSE(lines.empty());
  EXPECT_EQ(lines[0], "domain lightmoe");
  for (const char* name : {"category 1 step", "category 2 phase", "category 3 layer", "category 4 op"}) {
    EXPECT_EQ(std::count(lines.begin(), lines.end(), name), 1) << name;
  }
  EXPECT_EQ(count(lines, "push "), count(lines, "pop")) << "every range ends";
  std::set<std::string> names;
  std::string decode;
  for (const std::string& line : lines) {
    if (line.rfind("string ", 0) != 0) continue;
    const size_t space = line.find(' ', 7);
    const std::string name = line.substr(space + 1);
    EXPECT_TRUE(names.insert(name).second) << name << " is registered twice";
    if (name == "decode") decode = line.substr(7, space - 7);
  }
  for (const char* name :
       {"prefill", "decode", "L00.attention", "L03.moe", "rms_norm", "gemm.dense", "gemm.grouped_m"}) {
    EXPECT_EQ(names.count(name), 1u) << name;
  }
  EXPECT_EQ(count(lines, "push " + decode + " category 2 payload 1"), 2)
      << "two tokens after the prefill's, one sequence";
}

TEST(Nvtx, ChosenStepsAlone) {
  if (!nvtx_available()) GTEST_SKIP() << "no NVTX headers here";
  const testing::ScratchDirectory scratch;
  std::vector<std::string> arguments = kGenerate;
  arguments.insert(arguments.end(), {"--profile-steps", "1:1"});
  const std::vector<std::string> lines = recorded(arguments, scratch.path() / "nvtx.txt");
  int decodes = 0;
  for (const std::string& line : lines) {
    EXPECT_EQ(line.find(" prefill"), std::string::npos) << line;
    decodes += line.rfind("string ", 0) == 0 && line.find(" decode") != std::string::npos;
  }
  EXPECT_EQ(decodes, 1);
  EXPECT_EQ(count(lines, "push "), count(lines, "pop"));
}

TEST(Trace, StepsOfTheTimeline) {
  const testing::ScratchDirectory scratch;
  const std::filesystem::path file = scratch.path() / "trace.json";
  std::vector<std::string> arguments = kGenerate;
  arguments.insert(arguments.end(), {"--profile-steps", "2", "--trace", file.string()});
  const ProgramResult r = run_lightmoe(arguments);
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const std::string text = testing::get_file(file);
  EXPECT_EQ(text.find("\"prefill\""), std::string::npos);
  const size_t first = text.find("\"decode\"");
  ASSERT_NE(first, std::string::npos);
  EXPECT_EQ(text.find("\"decode\"", first + 1), std::string::npos) << "the third pass alone";
}

TEST(Trace, StepsThatAreNoneAreRefused) {
  for (const char* range : {"a", "3:1", "1:", ":2", "-1:2", "1:2:3"}) {
    const ProgramResult r =
        run_lightmoe({"generate", "demo/base", "--prompt", "x", std::string("--profile-steps=") + range});
    EXPECT_EQ(r.exit_code, 2) << range << ": " << r.err;
  }
}

}  // namespace
}  // namespace lightmoe
