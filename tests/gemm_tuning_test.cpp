// Measured choices between GEMM backends: what the file holds, when it is believed, and that it decides.

#include "kernels/gemm_tuning.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <regex>

#include "tests/support/files.h"
#include "tests/support/program.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::get_file;
using testing::put_file;

class GemmTuning : public ::testing::Test {
 protected:
  ~GemmTuning() override { stop_gemm_tuning(); }
  std::string file() const { return (scratch_.path() / "tuning.txt").string(); }
  void use(bool measure) {
    use_gemm_tuning(file(), measure, [&](const std::string& line) { warnings_.push_back(line); });
  }
  static Gemm product(int64_t rows) {
    return {.a = testing::random_tensor({rows, 24}, DType::kF32, 1),
            .b = testing::random_tensor({16, 24}, DType::kF32, 2),
            .c = testing::random_tensor({rows, 16}, DType::kF32, 3),
            .trans_b = true,
            .beta = 1};
  }
  std::vector<std::string> warnings_;
  testing::ScratchDirectory scratch_;
};

TEST_F(GemmTuning, MeasuresANewShapeOnceAndLeavesTheResultAlone) {
  const Gemm op = product(5);
  Gemm plain = op;
  plain.c = op.c.clone();
  run(plain);
  use(true);
  run(op);
  EXPECT_TRUE(testing::close(op.c, testing::to_doubles(plain.c), 1e-5)) << "C is added to once, whatever was measured";
  const std::string chosen(tuned_gemm_backend(describe(op)));
  EXPECT_TRUE(chosen == "native" || chosen == "blas") << chosen;
  EXPECT_EQ(tuned_gemm_backend(describe(product(8))), chosen) << "5 and 8 rows are one shape";
  EXPECT_EQ(tuned_gemm_backend(describe(product(9))), "");
  write_gemm_tuning();
  const std::string text = get_file(file());
  EXPECT_EQ(text.rfind("lightmoe gemm tuning 1\nvalidator version\t", 0), 0u) << text;
  EXPECT_NE(text.find("dense nt f32xf32->f32 m=8 n=16 k=24 g=1 align="), std::string::npos) << text;
  stop_gemm_tuning();
  use(false);
  EXPECT_TRUE(warnings_.empty()) << warnings_[0];
  EXPECT_EQ(tuned_gemm_backend(describe(op)), chosen);
}

TEST_F(GemmTuning, WhatTheFileSaysIsWhatRuns) {
  use(true);
  run(product(3));
  write_gemm_tuning();
  // The slowest of all, which neither cost nor measurement would take.
  put_file(file(), std::regex_replace(get_file(file()), std::regex("\t(native|blas)\t"), "\treference\t"));
  use(false);
  const GemmDesc desc = describe(product(3));
  EXPECT_EQ(pick_gemm(desc).name, "reference");
  const GemmBackendScope forced("native");
  EXPECT_EQ(pick_gemm(desc).name, "native") << "a forced backend is not asked about";
}

TEST_F(GemmTuning, AForeignFileIsIgnoredAndSaid) {
  use(true);
  run(product(3));
  write_gemm_tuning();
  const std::string good = get_file(file());
  const std::pair<std::string, const char*> files[] = {
      {std::regex_replace(good, std::regex("validator version\t"), "validator version\tx"), "another version"},
      {"something else\n", "its first line is not"},
      {good + "no tabs here\n", "a line is not: shape, backend, microseconds"},
      {good + "shape\tnative\tfast\n", "no time in"},
  };
  for (const auto& [text, words] : files) {
    put_file(file(), text);
    warnings_.clear();
    use(false);
    ASSERT_EQ(warnings_.size(), 1u) << words;
    EXPECT_NE(warnings_[0].find(words), std::string::npos) << warnings_[0];
    EXPECT_EQ(tuned_gemm_backend(describe(product(3))), "");
  }
}

TEST_F(GemmTuning, ThroughTheProgram) {
  const std::string model = "tests/golden/plain", out = (scratch_.path() / "out.safetensors").string();
  const std::vector<std::string> dump = {
      "dump", model, "--input", model + "/golden.safetensors", "--out", out, "--force", "--gemm-tuning", file()};
  const testing::ProgramResult absent = testing::run_lightmoe(dump);
  EXPECT_EQ(absent.exit_code, 2) << absent.err;
  EXPECT_NE(absent.err.find("--gemm-tune measures one"), std::string::npos) << absent.err;
  std::vector<std::string> tune = dump;
  tune.push_back("--gemm-tune");
  EXPECT_EQ(testing::run_lightmoe(tune).exit_code, 0);
  const std::string text = get_file(file());
  EXPECT_NE(text.find("grouped_m nt f32xf32->f32"), std::string::npos) << text;
  EXPECT_EQ(testing::run_lightmoe(dump).exit_code, 0);
  EXPECT_EQ(get_file(file()), text) << "nothing new, nothing written";
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(scratch_.path()), {}), 2) << "nothing left beside it";
}

}  // namespace
}  // namespace lightmoe
