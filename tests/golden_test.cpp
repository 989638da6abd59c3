// The model against the golden checkpoints (tests/golden/README.md: results in float64, tolerances for float32).

#include <gtest/gtest.h>

#include <filesystem>

#include "kernels/adamw.h"
#include "loaders/safetensors.h"
#include "model/olmoe.h"
#include "model/weights.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::close;
using testing::to_doubles;
namespace fs = std::filesystem;

constexpr double kLogits = 1e-4;     // absolute
constexpr double kGradients = 1e-4;  // of the tensor's largest
constexpr double kLosses = 1e-6;     // relative
constexpr double kExact = 2e-7;      // of the largest, in f64: the files hold results rounded to f32

fs::path golden(const std::string& folder) { return fs::path("tests/golden") / folder; }

std::vector<int32_t> integers(const SafetensorsFile& file, const std::string& name) {
  const Tensor t = file.read(name, DType::kI32);
  return {t.data<int32_t>(), t.data<int32_t>() + t.numel()};
}
double scalar(const SafetensorsFile& file, const std::string& name, size_t index = 0) {
  return to_doubles(file.read(name, DType::kF64))[index];
}

// What dump would write, held in memory.
struct Seen {
  std::vector<Tensor> hidden, router_logits, slots, gates;
  Observer observer;
  Seen() {
    observer.on_hidden = [this](int, const Tensor& x) { hidden.push_back(x.clone()); };
    observer.on_router = [this](const RouterView& view) {
      router_logits.push_back(view.logits.clone());
      slots.push_back(view.slots.clone());
      gates.push_back(view.gates.clone());
    };
  }
};

void expect_relative(double actual, double expected, double tolerance, const char* what) {
  EXPECT_NEAR(actual, expected, tolerance * std::abs(expected)) << what;
}

class Golden : public ::testing::TestWithParam<std::string> {
 protected:
  // -sharded and -fused have the results of the folder they are made of.
  static std::string results_of(std::string folder) {
    for (const char* suffix : {"-sharded", "-fused"}) {
      if (folder.ends_with(suffix)) folder.resize(folder.size() - std::string(suffix).size());
    }
    return folder;
  }
  bool is_bf16() const { return GetParam().ends_with("-bf16"); }
  SafetensorsFile results() const { return SafetensorsFile(golden(results_of(GetParam())) / "golden.safetensors"); }
  std::unique_ptr<Olmoe> model(DType dtype = DType::kF32) const { return load_model(golden(GetParam()), dtype); }
};

class GoldenTraining : public Golden {};  // the f32 folders: gradients, AdamW, greedy tokens
class GoldenRecompute : public Golden {};
class GoldenBf16 : public Golden {};

Batch batch_of(const SafetensorsFile& file, bool padded = false) {
  const TensorInfo* info = file.find("input_ids");
  std::vector<uint8_t> mask;
  if (padded) {
    for (const int32_t m : integers(file, "pad.attention_mask")) mask.push_back(static_cast<uint8_t>(m));
  }
  return make_batch(integers(file, "input_ids"), info->shape[0], info->shape[1],
                    integers(file, padded ? "pad.labels" : "labels"), mask);
}

TEST_P(Golden, LogitsMatchInDouble) {
  const auto m = model(DType::kF64);
  EXPECT_TRUE(close(m->logits(m->forward(batch_of(results()), {}), {}), to_doubles(results().read("logits")), kExact));
}

TEST_P(Golden, ForwardMatches) {
  const auto m = model();
  const SafetensorsFile file = results();
  Seen seen;
  const Tensor hidden = m->forward(batch_of(file), {.observer = &seen.observer});
  EXPECT_TRUE(close(m->logits(hidden, {}), to_doubles(file.read("logits")), 0, kLogits));
  for (size_t l = 0; l < m->blocks.size(); ++l) {
    SCOPED_TRACE(l);
    EXPECT_EQ(
        std::vector<int32_t>(seen.slots[l].data<int32_t>(), seen.slots[l].data<int32_t>() + seen.slots[l].numel()),
        integers(file, fmt::format("selected_experts.{}", l)));
    EXPECT_TRUE(close(seen.router_logits[l], to_doubles(file.read(fmt::format("router_logits.{}", l))), 0, kLogits));
    if (is_bf16()) continue;
    EXPECT_TRUE(close(seen.hidden[l], to_doubles(file.read(fmt::format("hidden_states.{}", l))), 0, kLogits));
    EXPECT_TRUE(close(seen.gates[l], to_doubles(file.read(fmt::format("routing_weights.{}", l))), 0, kLogits));
  }
  if (!is_bf16()) {
    EXPECT_TRUE(close(hidden, to_doubles(file.read(fmt::format("hidden_states.{}", m->blocks.size()))), 0, kLogits));
  }
}

TEST_P(GoldenBf16, InMemoryIsTheSameNumbers) {
  const auto wide = model(), narrow = model(DType::kBF16);
  EXPECT_EQ(2 * narrow->stored_bytes(), wide->stored_bytes());
  const Batch batch = batch_of(results());
  // Products of bf16 factors are exact in f32, only the order of sums may differ.
  EXPECT_TRUE(close(narrow->logits(narrow->forward(batch, {}), {}),
                    to_doubles(wide->logits(wide->forward(batch, {}), {})), 0, 1e-5));
}

TEST_P(Golden, LossesMatch) {
  const auto m = model();
  const SafetensorsFile file = results();
  m->set_trainable([](const std::string&) { return false; });
  const TrainLosses losses = m->forward_backward(batch_of(file), {});
  const double ce = losses.ce_sum / static_cast<double>(losses.labels);
  expect_relative(ce, scalar(file, "loss_ce"), kLosses, "ce");
  expect_relative(losses.aux, scalar(file, "loss_aux"), kLosses, "aux");
  if (is_bf16()) return;
  expect_relative(ce + 0.01 * losses.aux, scalar(file, "loss_total"), kLosses, "total");

  const Batch padded = batch_of(file, true);
  const Tensor logits = m->logits(m->forward(padded, {}), {});
  const Tensor expected = file.read("pad.logits");
  for (int64_t t = 0; t < padded.tokens(); ++t) {
    if (padded.mask.data<uint8_t>()[t] == 0) continue;
    const Tensor row = expected.reshape(logits.shape()).row(t);
    EXPECT_TRUE(close(logits.row(t), to_doubles(row), 0, kLogits)) << "token " << t;
  }
  const TrainLosses pad = m->forward_backward(padded, {});
  expect_relative(pad.ce_sum / static_cast<double>(pad.labels), scalar(file, "pad.loss_ce"), kLosses, "padded ce");
  expect_relative(pad.aux, scalar(file, "pad.loss_aux"), kLosses, "padded aux");
}

TrainLosses train_pass(Olmoe& model, const Batch& batch, Recompute recompute = Recompute::kNone) {
  int64_t labels = 0;
  for (int64_t i = 0; i < batch.tokens(); ++i) labels += batch.labels.data<int32_t>()[i] != -100;
  return model.forward_backward(
      batch, {.loss_scale = 1.0 / static_cast<double>(labels), .aux_coef = 0.01, .recompute = recompute});
}

TEST_P(GoldenTraining, GradientsMatch) {
  const SafetensorsFile expected(golden(results_of(GetParam())) / "grads.safetensors");
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const auto m = model(dtype);
    train_pass(*m, batch_of(results()));
    const std::vector<StoredTensor> tensors = stored_tensors(*m);
    EXPECT_EQ(tensors.size(), expected.tensors().size());
    for (const StoredTensor& stored : tensors) {
      const Tensor gradient = stored.view(stored.parameter->grad);
      EXPECT_TRUE(close(gradient, to_doubles(expected.read(stored.name)), dtype == DType::kF64 ? kExact : kGradients))
          << stored.name << " " << name_of(dtype);
    }
  }
}

TEST_P(GoldenRecompute, GivesTheSameBits) {
  const Batch batch = batch_of(results());
  const auto plain = model();
  const TrainLosses losses = train_pass(*plain, batch);
  for (const Recompute recompute : {Recompute::kMoe, Recompute::kBlock}) {
    const auto again = model();
    const TrainLosses same = train_pass(*again, batch, recompute);
    EXPECT_EQ(losses.ce_sum, same.ce_sum);
    EXPECT_EQ(losses.aux, same.aux);
    const auto a = plain->parameters(), b = again->parameters();
    for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(testing::bits_equal(a[i]->grad, b[i]->grad)) << a[i]->name;
  }
}

// Three steps of AdamW as the golden ones; the losses before each and after the last are compared on the way.
void adamw_steps(Olmoe& m, const SafetensorsFile& file, double tolerance) {
  const Batch batch = batch_of(file);
  AdamW adamw{.tensors = {}, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8};
  for (const ParameterPtr& p : m.parameters()) {
    const DType dtype = p->value.dtype();
    const Tensor m1 = Tensor::zeros(p->value.shape(), dtype), v = Tensor::zeros(p->value.shape(), dtype);
    adamw.tensors.push_back(
        {.w = p->value, .grad = p->ensure_grad(), .m = m1, .v = v, .lr = 1e-3, .weight_decay = 0.1});
  }
  for (int64_t step = 1; step <= 4; ++step) {
    for (const ParameterPtr& p : m.parameters()) p->zero_grad();
    const TrainLosses losses = train_pass(m, batch);
    const double total = losses.ce_sum / static_cast<double>(losses.labels) + 0.01 * losses.aux;
    const auto index = static_cast<size_t>(step - 1);
    expect_relative(total, scalar(file, "adamw_losses", index), tolerance, "loss");
    expect_relative(losses.aux, scalar(file, "adamw_aux", index), tolerance, "aux");
    if (step == 4) break;
    std::vector<Tensor> gradients;
    for (const ParameterPtr& p : m.parameters()) gradients.push_back(p->grad);
    expect_relative(gradient_norm(gradients), scalar(file, "grad_norms", index), tolerance, "gradient norm");
    adamw.step = step;
    run(adamw);
  }
}

TEST_P(GoldenTraining, ThreeAdamWStepsMatch) {
  const SafetensorsFile expected(golden(results_of(GetParam())) / "adamw3.safetensors");
  const auto exact = model(DType::kF64);
  adamw_steps(*exact, results(), 1e-9);
  for (const StoredTensor& stored : stored_tensors(*exact)) {
    const Tensor value = stored.view(stored.parameter->value);
    EXPECT_TRUE(close(value, to_doubles(expected.read(stored.name)), kExact)) << stored.name;
  }
  // In f32 the update m / sqrt(v) of a weight whose gradient is near the rounding error of the sums it comes from may be off by
  // a good part of lr = 1e-3; such weights are few. So: no weight beyond lr, and the tensor as a whole (rms) within 1e-5.
  const auto m = model();
  adamw_steps(*m, results(), 1e-5);
  for (const StoredTensor& stored : stored_tensors(*m)) {
    const std::vector<double> actual = to_doubles(stored.view(stored.parameter->value)),
                              want = to_doubles(expected.read(stored.name));
    double squares = 0, worst = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      worst = std::max(worst, std::abs(actual[i] - want[i]));
      squares += (actual[i] - want[i]) * (actual[i] - want[i]);
    }
    EXPECT_LT(worst, 1e-3) << stored.name;
    EXPECT_LT(std::sqrt(squares / static_cast<double>(want.size())), 1e-5) << stored.name;
  }
}

TEST_P(GoldenTraining, GreedyTokensWithACache) {
  const auto m = model();
  const SafetensorsFile file = results();
  const std::vector<int32_t> prompt = integers(file, "greedy_prompt"), expected = integers(file, "greedy_tokens");
  KvCache cache(m->config, 1, static_cast<int64_t>(prompt.size() + expected.size()), DType::kF32);
  std::vector<int32_t> next = prompt, generated;
  while (generated.size() < expected.size()) {
    const Tensor hidden = m->forward_cached(next, {static_cast<int32_t>(next.size())}, cache, {});
    const std::vector<double> logits = to_doubles(m->logits(hidden.slice(hidden.dim(0) - 1, hidden.dim(0)), {}));
    next = {static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin())};
    generated.push_back(next[0]);
  }
  EXPECT_EQ(generated, expected);
}

TEST_P(Golden, CachedInPiecesEqualsWhole) {
  const auto m = model();
  const SafetensorsFile file = results();
  const TensorInfo* info = file.find("input_ids");
  const std::vector<int32_t> ids = integers(file, "input_ids");
  const int64_t rows = info->shape[0], length = info->shape[1];
  const Tensor whole = m->forward(make_batch(ids, rows, length), {});
  KvCache cache(m->config, rows, length, DType::kF32);
  std::vector<std::vector<double>> last(static_cast<size_t>(rows));
  // Ragged pieces: row 0 takes 5 tokens while row 1 takes 3, and so on until both are through.
  std::vector<int64_t> done(static_cast<size_t>(rows), 0);
  for (int step = 0; done[0] < length || done[1] < length; ++step) {
    std::vector<int32_t> piece, counts;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = std::min<int64_t>(r == 0 ? 5 : 3 + 4 * (step % 2), length - done[static_cast<size_t>(r)]);
      const auto begin = ids.begin() + r * length + done[static_cast<size_t>(r)];
      piece.insert(piece.end(), begin, begin + n);
      counts.push_back(static_cast<int32_t>(n));
    }
    const Tensor hidden = m->forward_cached(piece, counts, cache, {});
    int64_t row = 0;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t& at = done[static_cast<size_t>(r)];
      const int64_t n = counts[static_cast<size_t>(r)];
      EXPECT_TRUE(
          close(hidden.slice(row, row + n), to_doubles(whole.slice(r * length + at, r * length + at + n)), 0, 1e-5));
      at += n, row += n;
    }
  }
}

std::string test_name(const ::testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}
const std::vector<std::string> kOriginals{"plain", "gqa-clip-renorm", "e64k8"};
std::vector<std::string> folders(const std::vector<std::string>& suffixes) {
  std::vector<std::string> all;
  for (const std::string& original : kOriginals) {
    for (const std::string& suffix : suffixes) all.push_back(original + suffix);
  }
  return all;
}
INSTANTIATE_TEST_SUITE_P(Folders, Golden, ::testing::ValuesIn(folders({"", "-sharded", "-fused", "-bf16"})), test_name);
INSTANTIATE_TEST_SUITE_P(Folders, GoldenTraining, ::testing::ValuesIn(folders({"", "-sharded", "-fused"})), test_name);
INSTANTIATE_TEST_SUITE_P(Folders, GoldenRecompute, ::testing::ValuesIn(kOriginals), test_name);
INSTANTIATE_TEST_SUITE_P(Folders, GoldenBf16, ::testing::ValuesIn(folders({"-bf16"})), test_name);

}  // namespace
}  // namespace lightmoe
