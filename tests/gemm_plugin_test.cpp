// Plug-ins: the example is right and computes the same model; each fault of tests/plugins/faulty.c is refused in one line.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "kernels/gemm_check.h"
#include "tests/support/files.h"
#include "tests/support/program.h"

namespace lightmoe {
namespace {

using testing::plugin_path;
using testing::ProgramResult;
using testing::run_lightmoe;

ProgramResult check_faulty(const std::string& fault) {
  return run_lightmoe({"gemm-check", plugin_path("faulty"), "--shape", "tiny", "--tokens", "4"},
                      {.environment = {"LIGHTMOE_TEST_FAULT=" + fault}});
}
int lines_of(const std::string& text) { return static_cast<int>(std::count(text.begin(), text.end(), '\n')); }

TEST(GemmPlugin, TheRightOneIsFoundRight) {
  const ProgramResult r = check_faulty("");
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_NE(r.out.find("2520 products checked on cpu, 0 wrong"), std::string::npos) << r.out;
  EXPECT_NE(r.out.find("experts dW"), std::string::npos);
}

TEST(GemmPlugin, WrongResultsAreFound) {
  for (const char* fault : {"tf32", "reads-c", "outside", "gather", "rounding", "skipped"}) {
    SCOPED_TRACE(fault);
    const ProgramResult r = check_faulty(fault);
    EXPECT_EQ(r.exit_code, 9);
    EXPECT_EQ(lines_of(r.err), 1) << r.err;
    EXPECT_NE(r.err.find("of 2520 products are wrong; the first: "), std::string::npos) << r.err;
  }
}

TEST(GemmPlugin, WhatIsNoPluginIsRefusedWithTheReason) {
  const std::pair<const char*, const char*> faults[] = {
      {"refuses", "refuses ABI 1.0"},
      {"magic", "magic 0x0"},
      {"major", "built for ABI 2.0, this program has 1.0"},
      {"size", "its struct has 8 bytes"},
      {"missing", "a function of the plug-in is missing"},
      {"name", "'native' is that of a backend already there"},
      {"letters", "expected lower-case letters"},
      {"create", "create failed with status 3"},
      {"status", "enqueue of plug-in blocked failed with status 7"},
      {"nothing", "supports no product"},
      {"crash", "(crashed)"},
  };
  for (const auto& [fault, words] : faults) {
    SCOPED_TRACE(fault);
    const ProgramResult r = check_faulty(fault);
    EXPECT_EQ(r.exit_code, 9);
    EXPECT_EQ(lines_of(r.err), 1) << r.err;
    EXPECT_NE(r.err.find(words), std::string::npos) << r.err;
  }
  const ProgramResult absent = run_lightmoe({"gemm-check", "./absent.so"});
  EXPECT_EQ(absent.exit_code, 9);
  EXPECT_NE(absent.err.find("absent.so"), std::string::npos) << absent.err;
  const ProgramResult no_library = run_lightmoe({"gemm-check", "./Makefile"});
  EXPECT_EQ(no_library.exit_code, 9) << no_library.err;
}

TEST(GemmPlugin, AModelRunsOnIt) {
  const testing::ScratchDirectory scratch;
  const std::string model = "tests/golden/plain", out = scratch.path() / "out.safetensors";
  const ProgramResult r = run_lightmoe({"dump", model, "--input", model + "/golden.safetensors", "--out", out, "--gemm",
                                        plugin_path("faulty"), "--gemm-picks"});
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_NE(r.err.find("grouped_m nt f32xf32->f32"), std::string::npos) << r.err;
  EXPECT_NE(r.err.find(": blocked"), std::string::npos) << r.err;
  EXPECT_EQ(r.err.find("native"), std::string::npos) << "every product is the plug-in's: " << r.err;
}

TEST(GemmPlugin, WhatItDoesNotSupportFallsToABuiltInBackendAndIsSaid) {
  const testing::ScratchDirectory scratch;
  const std::string model = "tests/golden/plain", out = scratch.path() / "out.safetensors";
  const ProgramResult r = run_lightmoe({"dump", model, "--input", model + "/golden.safetensors", "--out", out, "--gemm",
                                        plugin_path("faulty"), "--gemm-picks"},
                                       {.environment = {"LIGHTMOE_TEST_FAULT=dense-only"}});
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_NE(r.err.find("native (blocked does not support it)"), std::string::npos) << r.err;
}

TEST(GemmPlugin, AWrongOneNeverComputesAModel) {
  const testing::ScratchDirectory scratch;
  const std::string model = "tests/golden/plain", out = scratch.path() / "out.safetensors";
  const ProgramResult r = run_lightmoe(
      {"dump", model, "--input", model + "/golden.safetensors", "--out", out, "--gemm", plugin_path("faulty")},
      {.environment = {"LIGHTMOE_TEST_FAULT=tf32"}});
  EXPECT_EQ(r.exit_code, 9) << r.err;
  EXPECT_FALSE(std::filesystem::exists(out));
}

TEST(GemmCheck, BuiltInBackendsAreRight) {
  for (const GemmBackend& backend : gemm_backends()) {
    const GemmCheckReport report = check_gemm_backend(backend, std::string(backend.name));
    EXPECT_EQ(report.wrong, 0) << backend.name << ": " << report.first_wrong;
  }
}

}  // namespace
}  // namespace lightmoe
