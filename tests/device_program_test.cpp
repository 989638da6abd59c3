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
  // The verb on one device; it must succeed. "open sim": with the device's memory open to the host, as without LIGHTMOE_SIM_GUARD.
  ProgramResult on(const std::string& device, std::vector<std::string> arguments) {
    const bool open = device == "open sim";
    arguments.insert(arguments.end(), {"--device", open ? "sim" : device});
    const ProgramResult result = run_lightmoe(
        arguments, {.environment = {open ? "LIGHTMOE_SIM_GUARD=0" : "LIGHTMOE_SIM_GUARD=1", "OMP_WAIT_POLICY=passive"},
                    .deadline_seconds = 240});
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
    const Json json = parse_json(line, "json");
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

// What two evaluations found, and how many choices they counted where they do.
void expect_same_metrics(const std::string& cpu_file, const std::string& sim_file) {
  const Json cpu = read_json_file(cpu_file), sim = read_json_file(sim_file);
  const Json &expected = cpu.at("tasks")[0].at("metrics"), &actual = sim.at("tasks")[0].at("metrics");
  for (const auto& [name, value] : expected.items()) {
    if (!value.is_object() || !value.contains("value")) continue;
    const double number = value.at("value");
    EXPECT_NEAR(actual.at(name).at("value").get<double>(), number, 1e-4 * std::abs(number) + 1e-6) << name;
  }
  for (const char* counted : {"skip", "unit_blocks", "residency"}) {
    EXPECT_EQ(cpu.at("config").value(counted, Json()), sim.at("config").value(counted, Json()));
  }
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
  const Json cpu = parse_json(testing::get_file(path("cpu") + "/training.json"), "json"),
             sim = parse_json(testing::get_file(path("sim") + "/training.json"), "json");
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
  expect_same_metrics(path("cpu.json"), path("sim.json"));
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
    for (const char* device : {"cpu", "sim", "open sim"}) {
      std::vector<std::string> arguments = {"generate", kModel, "--tokens", kInput, "--max-new-tokens", "5"};
      arguments.insert(arguments.end(), sampling.begin(), sampling.end());
      outputs.push_back(on(device, arguments).out);
    }
    EXPECT_EQ(outputs[0], outputs[1]);
    EXPECT_EQ(outputs[0], outputs[2]);
    EXPECT_FALSE(outputs[0].empty());
  }
}

// Recorded steps of experts of many widths: which of them tokens choose is not known while the steps are recorded.
TEST_F(DeviceProgram, GeneratesTheSameTokensFromRaggedExperts) {
  on("cpu", {"calibrate", kModel, "--tokens", kInput, "--num-tokens", "40", "--length", "13", "--unit-gradients", "-o",
             path("stats")});
  const auto made = run_lightmoe(
      {"compress", kModel, "--method", "fisher-l", "--ratio", "0.4", "--stats", path("stats"), "-o", path("ragged")});
  ASSERT_EQ(made.exit_code, 0) << made.err;
  std::vector<std::string> outputs;
  for (const char* device : {"cpu", "sim", "open sim"}) {
    outputs.push_back(on(device, {"generate", path("ragged"), "--tokens", kInput, "--max-new-tokens", "5"}).out);
  }
  EXPECT_EQ(outputs[0], outputs[1]);
  EXPECT_EQ(outputs[0], outputs[2]);
  EXPECT_FALSE(outputs[0].empty());
}

// Every kind of extension, its own parameters alone: curves, and what the trained model evaluates to.
TEST_F(DeviceProgram, ExtensionsTrainAndRun) {
  on("cpu", {"calibrate", kModel, "--tokens", kInput, "--num-tokens", "40", "--length", "13", "--sample-tokens", "40",
             "--sample-inputs", "--all-outputs", "-o", path("stats")});
  on("cpu", {"split-units", kModel, "--statistics", path("stats"), "--blocks", "4", "-o", path("split")});
  for (const std::string kind : {"pesc:experts=4,rank=2", "smore", "mor1e:experts=6,clusters=3", "mode:width=8",
                                 "compressed-experts", "dsmoe:blocks=4"}) {
    SCOPED_TRACE(kind);
    const std::string name = kind.substr(0, kind.find(':'));
    std::vector<std::string> outputs;
    for (const std::string device : {"cpu", "sim"}) {
      std::vector<std::string> arguments = {"train",        kModel,
                                            "--tokens",     kInput,
                                            "--steps",      "2",
                                            "--lr",         "1e-2",
                                            "--batch-rows", "2",
                                            "--length",     "13",
                                            "--no-pack",    "--truncate",
                                            "--extend",     kind,
                                            "--train-only", "*.mlp." + name + ".*",
                                            "-o",           path(name + device)};
      if (name == "mor1e") arguments.insert(arguments.end(), {"--extend-clusters", path("stats")});
      if (name == "dsmoe") arguments.insert(arguments.end(), {"--sparsity-coef", "0.1"});
      on(device, arguments);
      on(device, {"eval", path(name + "cpu"), "--tokens", kInput, "--out", path(name + device + ".json")});
    }
    expect_same_curve(losses_of(path(name + "cpu.log.jsonl")), losses_of(path(name + "sim.log.jsonl")), 2);
    expect_same_metrics(path(name + "cpu.json"), path(name + "sim.json"));
  }
  for (const std::vector<std::string>& picks :
       {std::vector<std::string>{"--unit-blocks", "2"}, {"--unit-blocks", "2", "--unit-oracle"}}) {
    for (const std::string device : {"cpu", "sim"}) {
      std::vector<std::string> arguments = {"eval",  path("split"),         "--tokens", kInput, "--force",
                                            "--out", path(device + ".json")};
      arguments.insert(arguments.end(), picks.begin(), picks.end());
      on(device, arguments);
    }
    expect_same_metrics(path("cpu.json"), path("sim.json"));
  }
}

// Losses towards a teacher and towards sure routers, and choices that are changed at run time.
TEST_F(DeviceProgram, TeachersSurerRoutersAndChangedChoices) {
  on("cpu", {"calibrate", kModel, "--tokens", kInput, "--num-tokens", "40", "--length", "13", "--sample-tokens", "40",
             "--sample-inputs", "--all-outputs", "-o", path("stats")});
  on("cpu", {"compress", kModel, "--stats", path("stats"), "--ratio", "0.5", "--rank", "2", "-o", path("half")});
  const std::vector<std::pair<std::string, std::vector<std::string>>> ways = {
      {"distill", {"--distill", "0.5", "--distill-temperature", "2", "--anneal", "1"}},
      {"entropy", {"--entropy-coef", "0.1"}},
      {"router-kd", {"--router-kd"}}};
  for (const auto& [name, flags] : ways) {
    SCOPED_TRACE(name);
    for (const std::string device : {"cpu", "sim"}) {
      std::vector<std::string> arguments = {
          "recover",  path("half"), "--base",    kModel,       "--tokens",     kInput,
          "--steps",  "2",          "--lr",      "1e-3",       "--batch-rows", "2",
          "--length", "13",         "--no-pack", "--truncate", "-o",           path(name + device)};
      arguments.insert(arguments.end(), flags.begin(), flags.end());
      on(device, arguments);
    }
    expect_same_curve(losses_of(path(name + "cpu.log.jsonl")), losses_of(path(name + "sim.log.jsonl")), 2);
  }
  const std::vector<std::vector<std::string>> choices = {
      {"--skip-experts", path("stats")},
      {"--skip-experts", path("stats"), "--skip-by-likeness"},
      {"--resident", "20", "--buddies", path("stats"), "--buddy-max-share", "0.6"}};
  for (const std::vector<std::string>& flags : choices) {
    SCOPED_TRACE(flags[0]);
    for (const std::string device : {"cpu", "sim"}) {
      std::vector<std::string> arguments = {
          "eval", kModel, "--tokens", kInput, "--force", "--out", path(device + ".json")};
      arguments.insert(arguments.end(), flags.begin(), flags.end());
      on(device, arguments);
    }
    expect_same_metrics(path("cpu.json"), path("sim.json"));
  }
}

}  // namespace
}  // namespace lightmoe
