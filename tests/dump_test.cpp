// The verb `dump`, run as a program, against the golden files.

#include <gtest/gtest.h>

#include <map>

#include "loaders/safetensors.h"
#include "tests/support/files.h"
#include "tests/support/program.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::run_lightmoe;
using testing::TempDir;
using testing::to_doubles;
namespace fs = std::filesystem;

TEST(Dump, WritesTheGoldenTensorsAndGradients) {
  for (const std::string folder : {"plain", "gqa-clip-renorm-fused", "e64k8-sharded"}) {
    SCOPED_TRACE(folder);
    const TempDir dir;
    const fs::path base =
        folder == "plain" ? "tests/golden/plain" : "tests/golden/" + folder.substr(0, folder.rfind('-'));
    const fs::path out = dir / "out.safetensors";
    const auto run = run_lightmoe({"dump", "tests/golden/" + folder, "--input", (base / "golden.safetensors").string(),
                                   "--out", out.string(), "--gradients"});
    ASSERT_EQ(run.exit_code, 0) << run.err;
    const SafetensorsFile actual(out), golden(base / "golden.safetensors"), grads(base / "grads.safetensors");
    std::map<std::string, double> tolerance{{"loss_ce", 1e-6}, {"loss_aux", 1e-6}, {"loss_total", 1e-6}};
    size_t compared = 0;
    for (const TensorInfo& info : actual.tensors()) {
      const bool is_grad = info.name.starts_with("grad.");
      const SafetensorsFile& expected = is_grad ? grads : golden;
      const std::string name = is_grad ? info.name.substr(5) : info.name;
      ASSERT_NE(expected.find(name), nullptr) << name;
      EXPECT_EQ(info.shape, expected.find(name)->shape) << name;
      EXPECT_EQ(info.file_dtype, expected.find(name)->file_dtype) << name;
      ++compared;
      if (info.name.starts_with("selected")) {
        EXPECT_TRUE(testing::bits_equal(actual.read(info.name), expected.read(name))) << name;
      } else if (tolerance.contains(info.name) || is_grad) {
        const double relative = is_grad ? 1e-4 : tolerance[info.name];
        EXPECT_TRUE(testing::close(actual.read(info.name), to_doubles(expected.read(name)), relative)) << name;
      } else {
        EXPECT_TRUE(testing::close(actual.read(info.name), to_doubles(expected.read(name)), 0, 1e-4)) << name;
      }
    }
    EXPECT_EQ(compared,
              4 + 3 + 2 * 3 + grads.tensors().size());  // 3 hidden states and logits, losses, routers, gradients
  }
}

TEST(Dump, RefusesWhatItCannotDo) {
  const TempDir dir;
  const std::string model = "tests/golden/plain", golden = model + "/golden.safetensors",
                    out = (dir / "o.safetensors").string();
  const auto in = [&](const char* name) { return (dir / name).string(); };
  const Tensor ids = Tensor::from<int32_t>({1, 2, 3, 4}, {2, 2});
  write_safetensors(in("bare"), {{"input_ids", ids}});
  write_safetensors(in("float"), {{"input_ids", Tensor::zeros({2, 2}, DType::kF32)}});
  write_safetensors(in("large"), {{"input_ids", Tensor::from<int32_t>({1, 97}, {1, 2})}});
  write_safetensors(in("labels"), {{"input_ids", ids}, {"labels", Tensor::from<int32_t>({1, 2, 3, -1}, {2, 2})}});
  write_safetensors(in("holes"), {{"input_ids", Tensor::from<int32_t>({1, 2, 3}, {1, 3})},
                                  {"attention_mask", Tensor::from<int32_t>({1, 0, 1}, {1, 3})}});
  const auto code = [&](const std::string& input, std::vector<std::string> more = {}) {
    std::vector<std::string> arguments{"dump", model, "--input", input, "--out", out};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const auto run = run_lightmoe(arguments);
    EXPECT_EQ(fs::exists(out), run.exit_code == 0) << run.err;
    return run.exit_code;
  };
  EXPECT_EQ(code(in("bare"), {"--gradients"}), 2);
  EXPECT_EQ(code(in("bare"), {"--dtype", "f64"}), 2);
  EXPECT_EQ(code(in("bare"), {"--device", "cuda"}), 9);
  EXPECT_EQ(code(in("nothing")), 3);
  EXPECT_EQ(code(in("float")), 3);
  EXPECT_EQ(code(in("large")), 3);
  EXPECT_EQ(code(in("labels")), 3);
  EXPECT_EQ(code(in("holes")), 3);
  EXPECT_EQ(code(model + "/summary.json"), 3);
  EXPECT_EQ(code(in("bare")), 0);
  const auto again = run_lightmoe({"dump", model, "--input", in("bare"), "--out", out});
  EXPECT_EQ(again.exit_code, 2);
  EXPECT_EQ(code(golden, {"--force", "--dtype", "bf16"}), 0);
}

}  // namespace
}  // namespace lightmoe
