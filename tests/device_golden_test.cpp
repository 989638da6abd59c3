// The whole model on the devices beside the CPU (the simulator always, a GPU where there is one) against the golden checkpoints:
// the same code with another default device. Tolerances are those of float32 in tests/golden/README.md.

#include <filesystem>

#include "autograd/optimizer.h"
#include "loaders/safetensors.h"
#include "model/olmoe.h"
#include "model/weights.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::close;
using testing::to_doubles;

constexpr double kLogits = 1e-4;     // absolute
constexpr double kGradients = 1e-4;  // of the tensor's largest
constexpr double kLosses = 1e-6;     // relative

class DeviceGolden : public ::testing::TestWithParam<std::string> {
 protected:
  static std::vector<DeviceKind> devices() {
    std::vector<DeviceKind> list = testing::devices();
    std::erase(list, DeviceKind::kCpu);
    return list;
  }
  std::filesystem::path folder() const { return std::filesystem::path("tests/golden") / GetParam(); }
  SafetensorsFile results() const { return SafetensorsFile(folder() / "golden.safetensors"); }
};

std::vector<int32_t> integers(const SafetensorsFile& file, const std::string& name) {
  const Tensor t = file.read(name, DType::kI32).on(DeviceKind::kCpu);
  return {t.data<int32_t>(), t.data<int32_t>() + t.numel()};
}
double scalar(const SafetensorsFile& file, const std::string& name) {
  return to_doubles(file.read(name, DType::kF64))[0];
}
Batch batch_of(const SafetensorsFile& file) {
  const TensorInfo* info = file.find("input_ids");
  return make_batch(integers(file, "input_ids"), info->shape[0], info->shape[1], integers(file, "labels"), {});
}

TEST_P(DeviceGolden, ForwardMatches) {
  for (const DeviceKind device : devices()) {
    SCOPED_TRACE(name_of(device));
    const DeviceScope scope(device);
    const auto m = load_model(folder(), DType::kF32);
    const SafetensorsFile file = results();
    std::vector<Tensor> slots, gates;
    Observer observer;
    observer.on_router = [&](const RouterView& view) {
      slots.push_back(view.slots.clone());
      gates.push_back(view.gates.clone());
    };
    const Tensor hidden = m->forward(batch_of(file), {.observer = &observer});
    EXPECT_TRUE(close(m->logits(hidden, {}), to_doubles(file.read("logits")), 0, kLogits));
    for (size_t l = 0; l < m->blocks.size(); ++l) {
      const std::vector<double> chosen = to_doubles(slots[l]);
      EXPECT_EQ(std::vector<int32_t>(chosen.begin(), chosen.end()),
                integers(file, fmt::format("selected_experts.{}", l)));
      EXPECT_TRUE(close(gates[l], to_doubles(file.read(fmt::format("routing_weights.{}", l))), 0, kLogits));
    }
  }
}

TEST_P(DeviceGolden, LossesAndGradientsMatch) {
  for (const DeviceKind device : devices()) {
    SCOPED_TRACE(name_of(device));
    const DeviceScope scope(device);
    const auto m = load_model(folder(), DType::kF32);
    const SafetensorsFile file = results(), expected(folder() / "grads.safetensors");
    const std::vector<int32_t> labels = integers(file, "labels");
    const Batch batch = batch_of(file);
    const std::vector<double> shifted = to_doubles(batch.labels);
    const auto count =
        static_cast<double>(std::count_if(shifted.begin(), shifted.end(), [](double l) { return l >= 0; }));
    const TrainLosses losses = m->forward_backward(batch, {.loss_scale = 1 / count, .aux_coef = 0.01});
    EXPECT_NEAR(losses.ce_sum / count, scalar(file, "loss_ce"), kLosses * scalar(file, "loss_ce"));
    EXPECT_NEAR(losses.aux, scalar(file, "loss_aux"), kLosses * scalar(file, "loss_aux"));
    for (const StoredTensor& stored : stored_tensors(*m)) {
      const Tensor gradient = stored.view(stored.parameter->grad);
      EXPECT_TRUE(close(gradient, to_doubles(expected.read(stored.name)), kGradients)) << stored.name;
    }
    // One update: the optimizer's state lives on the device, too.
    Optimizer optimizer(m->parameters(), {.weight_decay = 0.1, .clip_norm = 0});
    const double norm = optimizer.gradient_norm();
    EXPECT_NEAR(norm, to_doubles(file.read("grad_norms", DType::kF64))[0], 1e-5 * norm);
    optimizer.step(1e-3, norm);
    const TrainLosses after = m->forward_backward(batch, {.loss_scale = 1 / count, .aux_coef = 0.01});
    const double total = after.ce_sum / count + 0.01 * after.aux;
    EXPECT_NEAR(total, to_doubles(file.read("adamw_losses", DType::kF64))[1], 1e-5 * total);
  }
}

TEST_P(DeviceGolden, GreedyTokensWithACache) {
  for (const DeviceKind device : devices()) {
    SCOPED_TRACE(name_of(device));
    const DeviceScope scope(device);
    const auto m = load_model(folder(), DType::kF32);
    const SafetensorsFile file = results();
    const std::vector<int32_t> prompt = integers(file, "greedy_prompt"), expected = integers(file, "greedy_tokens");
    KvCache cache(m->config, 1, static_cast<int64_t>(prompt.size() + expected.size()), DType::kF32);
    std::vector<int32_t> next = prompt, generated;
    while (generated.size() < std::min<size_t>(expected.size(), 4)) {
      const Tensor hidden = m->forward_cached(next, {static_cast<int32_t>(next.size())}, cache, {});
      const std::vector<double> logits = to_doubles(m->logits(hidden.slice(hidden.dim(0) - 1, hidden.dim(0)), {}));
      next = {static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin())};
      generated.push_back(next[0]);
    }
    EXPECT_TRUE(std::equal(generated.begin(), generated.end(), expected.begin()));
  }
}

INSTANTIATE_TEST_SUITE_P(Folders, DeviceGolden, ::testing::Values("plain", "gqa-clip-renorm", "e64k8"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace lightmoe
