// verify, inspect and random on whole model directories: faults of content rather than of format.

#include "model/verify.h"

#include <limits>

#include "loaders/finite_scan.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/olmoe.h"
#include "model/random_weights.h"
#include "model/summary.h"
#include "tests/support/files.h"
#include "tests/support/program.h"
#include "tests/support/testing.h"

namespace fs = std::filesystem;

namespace lightmoe {
namespace {

using testing::fails_with;
using testing::get_file;
using testing::put_file;
using testing::run_lightmoe;
using testing::TempDir;

OlmoeConfig small_config() { return read_config("tests/golden/plain"); }

// The named tensors of a golden folder with one change made by `edit`, as a new model directory.
using Tensors = std::vector<std::pair<std::string, Tensor>>;
void put_model(const fs::path& directory, const std::string& golden, const std::function<void(Tensors&)>& edit) {
  const Checkpoint files("tests/golden/" + golden);
  Tensors tensors;
  for (const std::string& name : files.names()) tensors.emplace_back(name, files.read(name, DType::kF32));
  edit(tensors);
  fs::create_directory(directory);
  put_file(directory / "config.json", get_file("tests/golden/" + golden + "/config.json"));
  write_safetensors(directory / "model.safetensors", tensors);
}
Tensor& find(Tensors& tensors, const std::string& name) {
  return std::find_if(tensors.begin(), tensors.end(), [&](const auto& t) { return t.first == name; })->second;
}
::testing::AssertionResult one_problem(const VerifyReport& report, const std::vector<std::string>& pieces) {
  if (report.problems.size() != 1) return ::testing::AssertionFailure() << report.problems.size() << " problems";
  return fails_with(ErrorKind::kInput, pieces, [&] { throw Error(ErrorKind::kInput, report.problems[0]); });
}

TEST(Verify, GoldenFoldersAreWhole) {
  for (const auto& entry : fs::directory_iterator("tests/golden")) {
    if (!fs::exists(entry.path() / "config.json")) continue;
    const VerifyReport report = verify_model(entry.path());
    EXPECT_TRUE(report.ok()) << entry.path() << ": " << (report.ok() ? "" : report.problems[0]);
    EXPECT_EQ(report.expected, report.matched);
    EXPECT_EQ(report.expected, report.in_files);
    EXPECT_EQ(report.layout, entry.path().string().ends_with("-fused") ? "fused" : "per-expert");
  }
}

TEST(Verify, AnotherModelsTokenizerIsNamed) {
  const TempDir dir;
  put_model(dir / "m", "plain", [](Tensors&) {});
  put_file(dir / "m/tokenizer.json", get_file("demo/base/tokenizer.json"));
  EXPECT_TRUE(one_problem(verify_model(dir / "m"), {"tokenizer.json", "ids up to 1023", "vocab_size in config.json"}));
  const auto refused = run_lightmoe({"generate", (dir / "m").string(), "--prompt", "a"});
  EXPECT_EQ(refused.exit_code, 3);
  EXPECT_NE(refused.err.find("another model's tokenizer"), std::string::npos) << refused.err;
}

TEST(Verify, ContentFaultsAreNamed) {
  const TempDir dir;
  const std::string up = "model.layers.1.mlp.experts.7.up_proj.weight";
  put_model(dir / "transposed", "plain", [&](Tensors& t) { find(t, up) = find(t, up).reshape({64, 32}); });
  EXPECT_TRUE(
      one_problem(verify_model(dir / "transposed"), {"model.safetensors", up, "[64, 32]", "expected [32, 64]"}));

  put_model(dir / "missing", "plain",
            [&](Tensors& t) { std::erase_if(t, [&](const auto& x) { return x.first == up; }); });
  EXPECT_TRUE(one_problem(verify_model(dir / "missing"), {up, "[32, 64]", "is missing"}));

  put_model(dir / "extra", "plain",
            [&](Tensors& t) { t.emplace_back("model.layers.2.oops", Tensor::zeros({3}, DType::kF32)); });
  EXPECT_TRUE(one_problem(verify_model(dir / "extra"), {"model.layers.2.oops", "[3]", "not one that", "config.json"}));

  put_model(dir / "integers", "plain", [&](Tensors& t) { find(t, up) = Tensor::zeros({32, 64}, DType::kI32); });
  EXPECT_TRUE(one_problem(verify_model(dir / "integers"), {up, "I32", "expected F32, BF16"}));

  put_model(dir / "fused", "plain-fused", [&](Tensors& t) {
    Tensor& x = find(t, "model.layers.0.mlp.experts.gate_up_proj");
    x = x.reshape({8, 32, 128});
  });
  EXPECT_TRUE(one_problem(verify_model(dir / "fused"), {"gate_up_proj", "[8, 32, 128]", "expected [8, 64, 64]"}));

  put_model(dir / "nan", "plain", [&](Tensors& t) {
    find(t, up).data<float>()[100] = std::numeric_limits<float>::quiet_NaN();
    find(t, up).data<float>()[2047] = std::numeric_limits<float>::infinity();
  });
  EXPECT_TRUE(
      one_problem(verify_model(dir / "nan"), {"model.safetensors", up, "2 of 2048 values", "nan at index 100"}));
  EXPECT_TRUE(verify_model(dir / "nan", {.values = false}).ok());
}

TEST(Verify, UnusedTensorsThatOthersWriteAreNotes) {
  const TempDir dir;
  put_model(dir / "m", "plain", [&](Tensors& t) {
    t.emplace_back("model.layers.0.self_attn.rotary_emb.inv_freq", Tensor::zeros({8}, DType::kF32));
  });
  const VerifyReport report = verify_model(dir / "m");
  EXPECT_TRUE(report.ok());
  EXPECT_EQ(report.notes.size(), 2u);  // this one, and no marker
}

TEST(Verify, ChangedFilesOfOurOwnAreNoticed) {
  const TempDir dir;
  OutputDirectory out(dir / "m", false);
  write_random_model(small_config(), DType::kBF16, 1, out.path(), 100'000);
  out.commit();
  const VerifyReport report = verify_model(dir / "m");
  EXPECT_TRUE(report.ok() && report.notes.empty());
  EXPECT_GT(Checkpoint(dir / "m").files().size(), 2u);
  const fs::path shard = dir / "m/model-00001-of-00003.safetensors";
  std::string bytes = get_file(shard);
  bytes.back() = static_cast<char>(bytes.back() ^ 1);  // one bit of a finite value
  put_file(shard, bytes);
  EXPECT_TRUE(one_problem(verify_model(dir / "m"), {"model-00001-of-00003.safetensors", "contents changed"}));
  EXPECT_TRUE(verify_model(dir / "m", {.hashes = false}).ok());
}

// A compressed layer: 3 stored experts (one of them W = 0), two adapters; every tensor that the slot table asks for, and no other.
TEST(Verify, CompressedModelsAreCheckedAgainstTheirSlotTable) {
  OlmoeConfig config = small_config();
  LayerShape shape{.zero_expert = {0, 1, 0}, .adapter_rank = {4, 2}};
  for (int s = 0; s < 8; ++s) shape.slots.push_back({.expert = s < 6 ? 0 : s - 5, .adapter = s < 2 ? s : -1});
  config.lightmoe_json = slot_tables_to_json({shape, shape}, Json()).dump();
  const auto parameters = compressed_parameters(config, {shape, shape});
  EXPECT_EQ(parameters.size(), stock_parameters(config).size() - 2 * 24 + 2 * (6 + 12));
  const auto put = [&](const fs::path& directory, const std::string& left_out) {
    fs::create_directory(directory);
    put_file(directory / "config.json", config_to_json(config));
    Tensors tensors;
    for (const ParameterInfo& p : parameters) {
      if (p.name != left_out) tensors.emplace_back(p.name, Tensor::zeros(Shape(p.shape), DType::kBF16));
    }
    write_safetensors(directory / "model.safetensors", tensors);
  };
  const TempDir dir;
  put(dir / "whole", "");
  const VerifyReport report = verify_model(dir / "whole");
  EXPECT_TRUE(report.ok()) << report.problems[0];
  EXPECT_EQ(report.layout, "compressed");
  put(dir / "cut", "model.layers.1.mlp.adapters.1.down_b");
  EXPECT_TRUE(one_problem(verify_model(dir / "cut"), {"model.layers.1.mlp.adapters.1.down_b", "[64, 2]", "missing"}));

  const ModelSummary summary = summarize_model(dir / "whole");
  ASSERT_EQ(summary.layers.size(), 2u);
  const LayerSummary& layer = summary.layers[0];
  EXPECT_EQ(layer.own, 1);
  EXPECT_EQ(layer.shared, 1);
  EXPECT_EQ(layer.sharing_slots, 6);
  EXPECT_EQ(layer.zero_slots, 1);
  EXPECT_EQ(layer.adapters, 2);
  EXPECT_EQ(layer.smallest_rank, 2);
  EXPECT_EQ(layer.largest_rank, 4);
  EXPECT_EQ(summary.kinds[static_cast<size_t>(ParameterKind::kAdapter)].parameters, 2 * 3 * (4 + 2) * (64 + 32));
}

TEST(Verify, BrokenFilesAreReportedNotThrown) {
  const TempDir dir;
  put_model(dir / "m", "plain", [](Tensors&) {});
  fs::resize_file(dir / "m/model.safetensors", fs::file_size(dir / "m/model.safetensors") - 1);
  EXPECT_TRUE(one_problem(verify_model(dir / "m"), {"model.safetensors", "truncated"}));
  put_file(dir / "m/config.json", "{");
  EXPECT_TRUE(one_problem(verify_model(dir / "m"), {"config.json:1:"}));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"absent"}, [&] { verify_model(dir / "absent"); }));
}

TEST(FiniteScan, FindsTheFirstInEveryDtype) {
  const TempDir dir;
  const double inf = std::numeric_limits<double>::infinity();
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
    const Tensor values = Tensor::zeros({1'500'001}, DType::kF64);  // several pieces
    for (const int64_t i : {int64_t{1'500'000}, int64_t{700'001}, int64_t{700'000}})
      values.data<double>()[i] = i % 2 ? inf : -inf;
    values.data<double>()[3] = 60000;  // near the end of f16, finite everywhere
    write_safetensors(dir / "x.safetensors", {{"odd", Tensor::zeros({1}, DType::kU8)}, {"x", values.to(dtype)}});
    const SafetensorsFile file(dir / "x.safetensors");
    const FiniteScan scan = scan_finite(file, *file.find("x"));
    EXPECT_EQ(scan.nonfinite, 3);
    EXPECT_EQ(scan.first, 700'000);
    EXPECT_EQ(scan.first_value, -inf);
    fs::remove(dir / "x.safetensors");
  }
}

TEST(RandomModel, StreamedAndInMemoryAreTheSame) {
  const TempDir dir;
  const OlmoeConfig config = small_config();
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const fs::path path = dir / std::string(name_of(dtype));
    fs::create_directory(path);
    write_random_model(config, dtype, 7, path, int64_t{1} << 30);
    const auto loaded = load_model(path, dtype), made = random_model(config, dtype, 7);
    const auto a = loaded->parameters(), b = made->parameters();
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(testing::bits_equal(a[i]->value, b[i]->value)) << a[i]->name;
  }
}

TEST(Program, RandomInspectVerify) {
  const TempDir dir;
  const std::string model = (dir / "m").string();
  auto result =
      run_lightmoe({"random", "tests/golden/plain/config.json", "-o", model, "--dtype", "f32", "--seed", "3"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  result = run_lightmoe({"random", "tiny", "-o", model});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_NE(result.err.find("--force"), std::string::npos) << result.err;
  result = run_lightmoe({"inspect", model, "--json", "--tensors"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  const Json json = parse_json(result.out, "inspect");
  EXPECT_EQ(json["total"]["parameters"], 145088);
  EXPECT_EQ(json["kinds"]["experts"]["dtype_bytes"]["F32"], 2 * 8 * 3 * 64 * 32 * 4);
  EXPECT_EQ(json["tensors"].size(), 69u);
  EXPECT_EQ(run_lightmoe({"verify", model}).exit_code, 0);
  fs::resize_file(dir / "m/model.safetensors", 1000);
  result = run_lightmoe({"verify", model});
  EXPECT_EQ(result.exit_code, 3);
  EXPECT_NE(result.err.find("error[E3]"), std::string::npos) << result.err;
  EXPECT_EQ(run_lightmoe({"random", "gigantic", "-o", (dir / "x").string()}).exit_code, 2);
  EXPECT_FALSE(fs::exists(dir / "x"));
}

}  // namespace
}  // namespace lightmoe
