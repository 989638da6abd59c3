// Every verb that computes, through the program with --device sim and the simulated device's memory closed to the host
// (LIGHTMOE_SIM_GUARD=1): a read that would crash beside a GPU crashes here. What they write equals what --device cpu writes, up to the
// rounding of float32 sums in another order.

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "loaders/json.h"
#include "loaders/safetensors.h"
#include "tests/support/files.h"
#include "tests/support/program.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::ProgramResult;
using testing::run_lightmoe;
using testing::to_doubles;

constexpr const char* kModel = "tests/golden/e64k8";
constexpr const char* kInput = "tests/golden/e64k8/golden.safetensors";

class DeviceProgram : public ::testing::Test {
 protected:
  // The verb on one device; it must succeed.
  ProgramResult on(const std::string& device, std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), {"--device", device});
    const ProgramResult result = run_lightmoe(
        arguments, {.environment = {"LIGHTMOE_SIM_GUARD=1", "OMP_WAIT_POLICY=passive"}, .deadline_seconds = 240});
    EXPECT_EQ(result.exit_code, 0) << device << ": " << result.err;
    return result;
  }
  std::string path(const std::string& name) const { return (scratch_.path() / name).string(); }

  testing::ScratchDirectory scratch_;
};

// Every tensor of two files, relative to the tensor's largest.
void expect_close_files(const std::string& a, const std::string& b, double tolerance) {
  const SafetensorsFile first(a), second(b);
  ASSERT_EQ(first.tensors().size(), second.tensors().size());
  for (const TensorInfo& info : first.tensors()) {
    EXPECT_TRUE(testing::close(second.read(info.name), to_doubles(first.read(info.name)), tolerance)) << info.name;
  }
}

std::vector<double> losses_of(const std::string& log) {
  std::ifstream file(log);
  std::vector<double> losses;
  for (std::string line; std::getline(file, line);) {
    const Json json = Json::parse(line);
    if (!json.contains("event")) losses.push_back(json.at("loss"));
  }
  return losses;
}

// f32 sums in another order; an update of AdamW divides by the gradient's size, so a gradient near rounding error may move a weight by
// a whole step the other way: losses drift apart by far less than they fall.
void expect_same_curve(const std::vector<double>& cpu, const std::vector<double>& sim, size_t steps) {
  ASSERT_EQ(cpu.size(), steps);
  ASSERT_EQ(sim.size(), steps);
  EXPECT_NEAR(sim[0], cpu[0], 1e-5 * cpu[0]);
  for (size_t i = 1; i < steps; ++i) EXPECT_NEAR(sim[i], cpu[i], 2e-3 * cpu[i]) << "step " << i + 1;
}

TEST_F(DeviceProgram, DumpAgreesWithTheCpu) {
  for (const char* device : {"cpu", "sim"}) {
    on(device, {"dump", kModel, "--input", kInput, "--out", path(device), "--gradients"});
  }
  expect_close_files(path("cpu"), path("sim"), 1e-4);
}

// Four steps of training on each device: the same curve. A run whose last step is lost goes on from its
// checkpoint, in the middle of a pass over the data, to the same bits.
TEST_F(DeviceProgram, TrainingCurvesAgreeAndResume) {
  const auto train = [&](const std::string& device) {
    return on(device, {"train",        kModel, "--tokens",    kInput, "--steps",   "4",          "--lr",         "1e-3",
                       "--batch-rows", "1",    "--length",    "13",   "--no-pack", "--truncate", "--save-every", "1",
                       "--resume",     "auto", "--eval-data", kInput, "-o",        path(device)});
  };
  for (const char* device : {"cpu", "sim"}) train(device);
  const std::vector<double> curve = losses_of(path("sim.log.jsonl"));
  expect_same_curve(losses_of(path("cpu.log.jsonl")), curve, 4);
  const Json cpu = Json::parse(testing::get_file(path("cpu") + "/training.json")),
             sim = Json::parse(testing::get_file(path("sim") + "/training.json"));
  const double expected = cpu.at("result").at("eval_loss");
  EXPECT_NEAR(sim.at("result").at("eval_loss").get<double>(), expected, 2e-3 * expected);

  const std::string weights = testing::get_file(path("sim") + "/model.safetensors");
  std::filesystem::remove_all(path("sim"));
  ASSERT_GT(std::filesystem::remove_all(path("sim.checkpoints") + "/step-00000004"), 0u);
  const ProgramResult resumed = train("sim");
  EXPECT_NE(resumed.err.find("resumed after step 3"), std::string::npos) << resumed.err;
  EXPECT_EQ(testing::get_file(path("sim") + "/model.safetensors"), weights);
  const std::vector<double> again = losses_of(path("sim.log.jsonl"));
  EXPECT_EQ(again, curve);
}

// calibrate, compress, recover with annealing, generate, eval: the method's whole way.
TEST_F(DeviceProgram, ACompressedModelIsRecoveredAndUsed) {
  for (const std::string device : {"cpu", "sim"}) {
    on(device, {"calibrate", kModel, "--tokens", kInput, "--num-tokens", "40", "--length", "13", "--sample-tokens", "8",
                "--sample-inputs", "--all-outputs", "-o", path(device + ".stats")});
    on(device, {"compress", kModel, "--stats", path("cpu.stats"), "--ratio", "0.5", "--rank", "2", "-o",
                path(device + ".half")});
    on(device, {"recover",      path("cpu.half"),
                "--base",       kModel,
                "--tokens",     kInput,
                "--steps",      "4",
                "--anneal",     "0.5",
                "--lr",         "1e-3",
                "--batch-rows", "2",
                "--length",     "13",
                "--no-pack",    "--truncate",
                "-o",           path(device)});
    on(device, {"eval", path("cpu"), "--tokens", kInput, "--reference", kModel, "--out", path(device + ".json")});
  }
  // What compares executions changes no result.
  on("sim", {"dump", path("cpu.half"), "--input", kInput, "--out", path("whole"), "--gradients"});
  for (const std::vector<std::string>& way :
       {std::vector<std::string>{"--base-once", "off"}, {"--moe-fused", "off"}, {"--dispatch-sort", "radix"}}) {
    std::vector<std::string> arguments = {"dump",  path("cpu.half"), "--input",    kInput,
                                          "--out", path(way[0]),     "--gradients"};
    arguments.insert(arguments.end(), way.begin(), way.end());
    on("sim", arguments);
    expect_close_files(path("whole"), path(way[0]), 1e-5);
  }
  const ProgramResult refused =
      run_lightmoe({"recover", path("cpu.half"), "--base", kModel, "--tokens", kInput, "--steps", "4", "--length", "13",
                    "--device", "sim", "--max-gpu-memory", "2MiB", "-o", path("too-large")});
  EXPECT_EQ(refused.exit_code, 5) << refused.err;
  EXPECT_NE(refused.err.find("a training step (weights "), std::string::npos) << refused.err;
  expect_close_files(path("cpu.stats"), path("sim.stats"), 1e-4);
  EXPECT_EQ(testing::get_file(path("cpu.half") + "/model.safetensors"),
            testing::get_file(path("sim.half") + "/model.safetensors"));
  expect_same_curve(losses_of(path("cpu.log.jsonl")), losses_of(path("sim.log.jsonl")), 4);
  const Json cpu = Json::parse(testing::get_file(path("cpu.json"))),
             sim = Json::parse(testing::get_file(path("sim.json")));
  const Json &expected = cpu.at("tasks")[0].at("metrics"), &actual = sim.at("tasks")[0].at("metrics");
  for (const auto& [name, value] : expected.items()) {
    if (!value.is_object() || !value.contains("value")) continue;
    const double number = value.at("value");
    EXPECT_NEAR(actual.at(name).at("value").get<double>(), number, 1e-4 * std::abs(number) + 1e-6) << name;
  }
}

TEST_F(DeviceProgram, RefusesUnknownExecutions) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> wrong = {
      {{"--base-once", "maybe"}, "expected one of on, off"},
      {{"--moe-fused", "yes"}, "expected one of auto, on, off"},
      {{"--dispatch-sort", "bubble"}, "expected one of counting, radix, cub"},
      {{"--dispatch-sort", "cub", "--device", "sim"}, "--device cuda only"}};
  for (const auto& [flags, text] : wrong) {
    std::vector<std::string> arguments = {"dump", kModel, "--input", kInput, "--out", path("never")};
    arguments.insert(arguments.end(), flags.begin(), flags.end());
    const ProgramResult result = run_lightmoe(arguments);
    EXPECT_EQ(result.exit_code, 2) << result.err;
    EXPECT_NE(result.err.find(text), std::string::npos) << result.err;
  }
}

TEST_F(DeviceProgram, GeneratesTheSameTokens) {
  for (const std::vector<std::string>& sampling :
       {std::vector<std::string>{}, {"--temperature", "0.8", "--top-k", "20", "--top-p", "0.9", "--seed", "7"}}) {
    std::vector<std::string> outputs;
    for (const char* device : {"cpu", "sim"}) {
      std::vector<std::string> arguments = {"generate", kModel, "--tokens", kInput, "--max-new-tokens", "5"};
      arguments.insert(arguments.end(), sampling.begin(), sampling.end());
      outputs.push_back(on(device, arguments).out);
    }
    EXPECT_EQ(outputs[0], outputs[1]);
    EXPECT_FALSE(outputs[0].empty());
  }
}

}  // namespace
}  // namespace lightmoe
