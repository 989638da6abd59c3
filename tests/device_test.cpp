// What stands between host and device: uploads in pieces, conversion, the limit on memory, and how often a training step waits.

#include "runtime/device.h"

#include <signal.h>

#include <cstring>
#include <filesystem>

#include "autograd/optimizer.h"
#include "loaders/safetensors.h"
#include "model/olmoe.h"
#include "model/training_estimate.h"
#include "model/weights.h"
#include "tests/support/devices.h"
#include "tests/support/program.h"

namespace lightmoe {
namespace {

std::vector<DeviceKind> devices_beside_the_cpu() {
  std::vector<DeviceKind> list = testing::devices();
  std::erase(list, DeviceKind::kCpu);
  return list;
}

TEST(Device, AnUploadArrivesPieceByPiece) {
  for (const DeviceKind device : devices_beside_the_cpu()) {
    for (const size_t bytes : {size_t{1}, size_t{8} << 20, (size_t{20} << 20) + 3}) {
      const Tensor t = Tensor::empty({static_cast<int64_t>(bytes)}, DType::kU8, device);
      size_t next = 0, largest = 0;
      upload(device, t.raw(), bytes, [&](void* piece, size_t offset, size_t count) {
        EXPECT_EQ(offset, next) << "in order";
        next += count, largest = std::max(largest, count);
        for (size_t i = 0; i < count; ++i) static_cast<uint8_t*>(piece)[i] = static_cast<uint8_t>((offset + i) * 7);
      });
      EXPECT_EQ(next, bytes);
      EXPECT_LE(largest, size_t{8} << 20) << "never all of it on the host";
      const Tensor host = t.on(DeviceKind::kCpu);
      for (size_t i = 0; i < bytes; ++i) ASSERT_EQ(host.data<uint8_t>()[i], static_cast<uint8_t>(i * 7)) << i;
    }
  }
}

TEST(Device, ConvertsWithoutTheHost) {
  for (const DeviceKind device : devices_beside_the_cpu()) {
    const DeviceScope scope(device);
    for (const int64_t count : {1, 7, 8, 33, 1000}) {
      const Tensor source = testing::random_tensor({count}, DType::kF32, 5);
      const TransferCounts before = transfer_counts();
      const Tensor narrow = source.to(DType::kBF16), wide = narrow.to(DType::kF32);
      EXPECT_EQ(transfer_counts().to_host, before.to_host);
      EXPECT_EQ(transfer_counts().to_device, before.to_device);
      const Tensor expected = source.on(DeviceKind::kCpu).to(DType::kBF16);
      EXPECT_EQ(std::memcmp(narrow.on(DeviceKind::kCpu).raw(), expected.raw(), static_cast<size_t>(expected.bytes())),
                0);
      const Tensor back = expected.to(DType::kF32);
      EXPECT_EQ(std::memcmp(wide.on(DeviceKind::kCpu).raw(), back.raw(), static_cast<size_t>(back.bytes())), 0);
    }
  }
}

TEST(Device, TheLimitIsKeptAndNothingLeaks) {
  const int64_t before = device_live_bytes();
  set_device_memory_limit(before + 1000);
  {
    const Tensor fits = Tensor::empty({600}, DType::kU8, DeviceKind::kSim);
    EXPECT_EQ(device_free_bytes(), 400);
    try {
      Tensor::empty({401}, DType::kU8, DeviceKind::kSim);
      ADD_FAILURE() << "over the limit";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kMemory);
      EXPECT_NE(std::string(error.what()).find("out of sim memory: 401 bytes asked for activations, "),
                std::string::npos)
          << error.what();
    }
    Tensor::empty({400}, DType::kU8, DeviceKind::kSim);
    Tensor::empty({4000}, DType::kU8, DeviceKind::kCpu);  // the host has no part in it
  }
  EXPECT_EQ(device_live_bytes(), before);
  set_device_memory_limit(0);
  EXPECT_EQ(device_live_bytes(), before);
}

// The host reads what it reports - cross-entropy, balance loss, gradient norm - and nothing else, so it never waits in between.
TEST(Device, ATrainingStepWaitsForWhatItReportsAlone) {
  for (const DeviceKind device : devices_beside_the_cpu()) {
    const DeviceScope scope(device);
    const auto m = load_model("tests/golden/plain", DType::kF32);
    Optimizer optimizer(m->parameters(), {.weight_decay = 0.1, .clip_norm = 1});
    const Batch batch = make_batch({1, 2, 3, 4, 5, 6, 7, 8}, 2, 4, {1, 2, 3, 4, 5, 6, 7, 8}, {});
    EXPECT_EQ(batch.num_labels, 6);
    for (int step = 0; step < 2; ++step) {  // the first makes gradients and moments
      optimizer.zero_grad();
      const int64_t before = transfer_counts().to_host;
      m->forward_backward(batch, {.loss_scale = 1.0 / 6, .aux_coef = 0.01});
      EXPECT_EQ(transfer_counts().to_host - before, 2) << "two losses";
      const double norm = optimizer.gradient_norm();
      optimizer.step(1e-3, norm);
      EXPECT_EQ(transfer_counts().to_host - before, 3) << "and the norm";
    }
  }
}

// Through the program: too little memory is one line and exit code 5, and a checkpoint that was saved before is whole.
TEST(Device, OutOfDeviceMemoryEndsARunAndKeepsItsCheckpoint) {
  const testing::ScratchDirectory scratch;
  const std::filesystem::path out = scratch.path() / "run", checkpoints = scratch.path() / "run.checkpoints";
  const std::vector<std::string> train = {"train",        "tests/golden/plain",
                                          "--tokens",     "tests/golden/plain/golden.safetensors",
                                          "--batch-rows", "1",
                                          "--length",     "8",
                                          "--steps",      "30",
                                          "--save-every", "1",
                                          "--device",     "sim",
                                          "-o",           out.string(),
                                          "--resume",     "auto"};
  const testing::ProgramResult stopped = testing::run_lightmoe(
      train, {.signal = SIGTERM, .signal_when = [&] { return std::filesystem::exists(checkpoints); }});
  ASSERT_EQ(stopped.exit_code, 128 + SIGTERM) << stopped.err;
  std::vector<std::string> little = train;
  little.insert(little.end(), {"--max-gpu-memory", "100KiB"});
  const testing::ProgramResult failed = testing::run_lightmoe(little);
  EXPECT_EQ(failed.exit_code, 5) << failed.err;
  EXPECT_NE(failed.err.find("a model of "), std::string::npos) << failed.err;
  EXPECT_NE(failed.err.find("--max-gpu-memory"), std::string::npos) << failed.err;
  // The weights fit, a step does not: said before the first one.
  little.back() = "1MiB";
  const testing::ProgramResult refused = testing::run_lightmoe(little);
  EXPECT_EQ(refused.exit_code, 5) << refused.err;
  EXPECT_NE(refused.err.find("a training step (weights "), std::string::npos) << refused.err;
  EXPECT_NE(refused.err.find("--batch-rows"), std::string::npos) << refused.err;
  EXPECT_EQ(std::count(refused.err.begin(), refused.err.end(), '\n'), 2)
      << refused.err;  // the data's line, the error's
  const testing::ProgramResult finished = testing::run_lightmoe(train);
  EXPECT_EQ(finished.exit_code, 0) << finished.err;
}

// What a step takes on a device beside weights, gradients and moments, all of them there: the estimate, within a fifth below and above.
TEST(Device, TrainingEstimateHolds) {
  const DeviceScope scope(DeviceKind::kSim);
  const auto model = load_model("demo/base", DType::kF32);
  const OlmoeConfig& config = model->config;
  const int64_t tokens = 128;
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < tokens; ++i) ids.push_back(static_cast<int32_t>(i * 7 % config.vocab_size));
  const Batch batch = make_batch(ids, 1, tokens, ids);
  for (const GemmCompute compute : {GemmCompute::kF32, GemmCompute::kBF16}) {
    for (const Recompute recompute : {Recompute::kNone, Recompute::kMoe, Recompute::kBlock}) {
      Optimizer optimizer(model->parameters(), {});
      optimizer.zero_grad();
      for (const ParameterPtr& p : model->parameters()) p->ensure_grad();
      const int64_t before = memory_use_total().live_bytes;
      reset_peak_memory();
      model->forward_backward(batch, {.compute = compute, .loss_scale = 1, .recompute = recompute});
      const auto measured = static_cast<double>(memory_use_total().peak_bytes - before);
      const TrainingEstimate estimate =
          estimate_training(config, model->parameters(), tokens, recompute, StepExecution::of_this_process(compute));
      const double expected = static_cast<double>(estimate.activation_bytes);
      EXPECT_LT(std::abs(measured / expected - 1), 0.2)
          << measured << " measured, " << expected << " expected; compute " << static_cast<int>(compute)
          << ", recompute " << static_cast<int>(recompute);
    }
  }
}

}  // namespace
}  // namespace lightmoe
