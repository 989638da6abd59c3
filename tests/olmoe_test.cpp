// A whole model: gradients in double, saving and loading stock and compressed checkpoints, what is refused, batches.

#include "model/olmoe.h"

#include "autograd/ops.h"
#include "kernels/elementwise.h"
#include "loaders/safetensors.h"
#include "model/parameter_table.h"
#include "model/weights.h"
#include "tests/support/extensions.h"
#include "tests/support/files.h"
#include "tests/support/moe_layers.h"

namespace lightmoe {
namespace {

using testing::bits_equal;
using testing::close;
using testing::to_doubles;
using testing::extensions::some_batch;
namespace fs = std::filesystem;

OlmoeConfig tiny_config() {
  OlmoeConfig c;
  c.vocab_size = 23, c.hidden_size = 12, c.intermediate_size = 10, c.num_layers = 2, c.num_heads = 2,
  c.num_kv_heads = 1;
  c.num_experts = 6, c.num_experts_per_token = 3, c.max_position_embeddings = 64, c.rms_norm_eps = 1e-5;
  c.clip_qkv = 1.5, c.norm_topk_prob = true, c.initializer_range = 0.4, c.eos_token_ids = {0}, c.pad_token_id = 1;
  return c;
}

const testing::LayerSpec kCompressed{.expert_of_slot = {0, 2, 3, 2, 1, 3},
                                     .rank_of_slot = {2, 2, 2, 2, 3, 2},
                                     .zero_experts = {3},
                                     .frozen_experts = {0, 1}};

// Layer 1 compressed, layer 0 stock.
std::unique_ptr<Olmoe> compressed_model(DType dtype) {
  std::unique_ptr<Olmoe> model = random_model(tiny_config(), dtype, 3);
  MoeLayer layer = testing::make_layer(kCompressed, dtype, dtype, 50);
  layer.router = model->blocks[1].moe.router;
  model->blocks[1].moe = layer;
  name_parameters(*model);
  return model;
}

void expect_same_parameters(const Olmoe& a, const Olmoe& b) {
  const auto of_a = a.parameters(), of_b = b.parameters();
  ASSERT_EQ(of_a.size(), of_b.size());
  for (size_t i = 0; i < of_a.size(); ++i) {
    EXPECT_EQ(of_a[i]->name, of_b[i]->name);
    EXPECT_TRUE(bits_equal(of_a[i]->value, of_b[i]->value)) << of_a[i]->name;
  }
}

TEST(Olmoe, WholeModelGradientCheck) {
  for (const bool compressed : {false, true}) {
    SCOPED_TRACE(compressed ? "compressed" : "stock");
    std::unique_ptr<Olmoe> model =
        compressed ? compressed_model(DType::kF64) : random_model(tiny_config(), DType::kF64, 3);
    const Batch batch = some_batch();
    const auto value = [&] {
      std::vector<Var> probs;
      std::vector<Tensor> slots;
      Observer observer;
      observer.on_router = [&](const RouterView& view) {
        probs.push_back(Tape::constant(view.probs));
        slots.push_back(view.slots);
      };
      Tape tape(false);
      const Var hidden = Tape::constant(model->forward(batch, {.observer = &observer}));
      return 0.1 * lm_head_loss(tape, hidden, model->lm_head, batch.labels, 1, {}).value() +
             0.3 * load_balance_loss(tape, probs, slots, batch.mask, 1).value();
    };
    const TrainLosses losses = model->forward_backward(batch, {.loss_scale = 0.1, .aux_coef = 0.3});
    EXPECT_NEAR(0.1 * losses.ce_sum + 0.3 * losses.aux, value(), 1e-12);
    std::vector<Tensor> gradients;
    for (const ParameterPtr& p : model->parameters()) gradients.push_back(p->trainable ? p->grad.clone() : Tensor());
    size_t i = 0;
    for (const ParameterPtr& p : model->parameters()) {
      const Tensor gradient = gradients[i++];
      if (!gradient.defined()) continue;
      double largest = 1e-3;
      for (const double g : to_doubles(gradient)) largest = std::max(largest, std::abs(g));
      for (int64_t e = 0; e < p->value.numel(); e += 1 + p->value.numel() / 5) {
        double* w = p->value.data<double>() + e;
        const double kept = *w;
        *w = kept + 1e-5;
        const double above = value();
        *w = kept - 1e-5;
        const double numeric = (above - value()) / 2e-5;
        *w = kept;
        EXPECT_NEAR(gradient.data<double>()[e], numeric, 1e-6 * largest) << p->name << "[" << e << "]";
      }
    }
  }
}

TEST(Olmoe, GradientsAccumulateOverMicroBatchesAndFrozenOnesHaveNone) {
  std::unique_ptr<Olmoe> model = compressed_model(DType::kF64);
  model->set_trainable([](const std::string& name) {
    return name.find("bank.2") != std::string::npos || name.find("adapters") != std::string::npos;
  });
  const Batch batch = some_batch();
  model->forward_backward(batch, {});
  std::vector<Tensor> once;
  for (const ParameterPtr& p : model->parameters()) {
    EXPECT_EQ(p->grad.defined(), p->trainable) << p->name;
    once.push_back(p->trainable ? p->grad.clone() : Tensor());
  }
  model->forward_backward(batch, {});
  size_t i = 0;
  for (const ParameterPtr& p : model->parameters()) {
    const Tensor& first = once[i++];
    if (!p->trainable) continue;
    run(Scale{.alpha = 2, .x = first, .y = first});
    EXPECT_TRUE(close(p->grad, to_doubles(first), 1e-12)) << p->name;
  }
}

TEST(Olmoe, PaddingAndPackingDoNotChangeAToken) {
  const std::unique_ptr<Olmoe> model = compressed_model(DType::kF64);
  const std::vector<int32_t> text{3, 7, 1, 20, 5};
  const Tensor alone = model->forward(make_batch(text, 1, 5), {});
  const std::vector<int32_t> right{3, 7, 1, 20, 5, 9, 9}, left{9, 9, 3, 7, 1, 20, 5};
  const Tensor padded_right = model->forward(make_batch(right, 1, 7, {}, {1, 1, 1, 1, 1, 0, 0}), {});
  const Tensor padded_left = model->forward(make_batch(left, 1, 7, {}, {0, 0, 1, 1, 1, 1, 1}), {});
  const Tensor packed = model->forward(make_packed_batch(left, {}, {0, 1, 0, 1, 2, 3, 4}, {0, 2, 7}), {});
  EXPECT_TRUE(close(padded_right.slice(0, 5), to_doubles(alone), 1e-13));
  EXPECT_TRUE(close(padded_left.slice(2, 7), to_doubles(alone), 1e-13));
  EXPECT_TRUE(close(packed.slice(2, 7), to_doubles(alone), 1e-13));
  EXPECT_THROW(make_batch(right, 1, 7, {}, {1, 0, 1, 1, 1, 0, 0}), Error);
}

TEST(Olmoe, StoredTensorsAreTheParameterTable) {
  const std::unique_ptr<Olmoe> stock = random_model(tiny_config(), DType::kF32, 1);
  const std::unique_ptr<Olmoe> compressed = compressed_model(DType::kF32);
  std::vector<LayerShape> shapes;
  for (const Block& block : compressed->blocks)
    shapes.push_back(shape_of(block.moe, compressed->config.intermediate_size));
  const auto expect_same = [](const Olmoe& model, const std::vector<ParameterInfo>& table) {
    std::map<std::string, std::vector<int64_t>> ours, theirs;
    for (const StoredTensor& t : stored_tensors(model)) ours[t.name] = t.shape();
    for (const ParameterInfo& p : table) theirs[p.name] = p.shape;
    EXPECT_EQ(ours, theirs);
  };
  expect_same(*stock, stock_parameters(stock->config));
  expect_same(*compressed, compressed_parameters(compressed->config, shapes));
}

TEST(OlmoeFiles, StockModelsComeBackBitForBit) {
  const testing::TempDir dir;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const std::unique_ptr<Olmoe> model = random_model(tiny_config(), dtype, 1);
    const fs::path path = dir.path() / std::string(name_of(dtype));
    fs::create_directory(path);
    save_model(*model, path, dtype, 4000);  // several shards
    EXPECT_TRUE(fs::exists(path / "model.safetensors.index.json"));
    LoadReport report;
    const std::unique_ptr<Olmoe> again = load_model(path, dtype, &report);
    expect_same_parameters(*model, *again);
    EXPECT_EQ(report.tensors_in_file, report.tensors_used);
    EXPECT_TRUE(report.unexpected.empty());
    EXPECT_EQ(again->config.torch_dtype, dtype == DType::kF32 ? "float32" : "bfloat16");
  }
}

TEST(OlmoeFiles, CompressedModelsComeBackBitForBit) {
  const testing::TempDir dir;
  std::unique_ptr<Olmoe> model = compressed_model(DType::kF32);
  model->config.lightmoe_json = R"({"method": {"name": "test", "ratio": 0.5}})";
  save_model(*model, dir.path(), DType::kF32, int64_t{1} << 30);
  const std::unique_ptr<Olmoe> again = load_model(dir.path(), DType::kF32);
  expect_same_parameters(*model, *again);
  EXPECT_NE(again->config.lightmoe_json.find("\"ratio\":0.5"), std::string::npos) << again->config.lightmoe_json;
  const MoeLayer &a = model->blocks[1].moe, &b = again->blocks[1].moe;
  for (size_t s = 0; s < a.slots.size(); ++s) {
    EXPECT_EQ(a.slots[s].expert, b.slots[s].expert);
    EXPECT_EQ(a.slots[s].adapter, b.slots[s].adapter);
  }
  EXPECT_EQ(b.experts[3].gate_up, nullptr);
  const Batch batch = some_batch();
  EXPECT_TRUE(bits_equal(model->forward(batch, {}), again->forward(batch, {})));

  model->blocks[1].moe.annealed.push_back({.slot = 1, .original = model->blocks[1].moe.experts[0]});
  EXPECT_THROW(save_model(*model, dir.path(), DType::kF32, int64_t{1} << 30), Error);
}

TEST(OlmoeFiles, TiedHeadsAreStoredOnce) {
  const testing::TempDir dir;
  OlmoeConfig config = tiny_config();
  config.tie_word_embeddings = true;
  const std::unique_ptr<Olmoe> model = random_model(config, DType::kF32, 1);
  EXPECT_EQ(model->lm_head, model->embedding);
  save_model(*model, dir.path(), DType::kF32, int64_t{1} << 30);
  EXPECT_FALSE(Checkpoint(dir.path()).contains("lm_head.weight"));
  const std::unique_ptr<Olmoe> again = load_model(dir.path(), DType::kF32);
  expect_same_parameters(*model, *again);
  again->forward_backward(some_batch(), {});
  EXPECT_TRUE(again->embedding->grad.defined());
}

// The tensors of the "plain" folder with one change, beside its config.
std::string error_of(const std::function<void(std::vector<std::pair<std::string, Tensor>>&)>& change) {
  const testing::TempDir dir;
  const fs::path source = "tests/golden/plain";
  fs::copy_file(source / "config.json", dir.path() / "config.json");
  const SafetensorsFile file(source / "model.safetensors");
  std::vector<std::pair<std::string, Tensor>> tensors;
  for (const TensorInfo& info : file.tensors()) tensors.emplace_back(info.name, file.read(info.name));
  change(tensors);
  write_safetensors(dir.path() / "model.safetensors", tensors);
  try {
    load_model(dir.path(), DType::kF32);
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kInput);
    return e.what();
  }
  return "loaded";
}
using Tensors = std::vector<std::pair<std::string, Tensor>>;

TEST(OlmoeFiles, MissingUnexpectedAndWrongTensorsAreNamed) {
  const std::string gone = "model.layers.1.mlp.experts.3.up_proj.weight";
  std::string message = error_of([&](Tensors& t) { std::erase_if(t, [&](const auto& e) { return e.first == gone; }); });
  EXPECT_NE(message.find("1 tensor missing: \"" + gone + "\""), std::string::npos) << message;

  message = error_of(
      [](Tensors& t) { std::erase_if(t, [](const auto& e) { return e.first.find("experts") != std::string::npos; }); });
  EXPECT_NE(message.find("48 tensors missing"), std::string::npos) << message;
  EXPECT_NE(message.find(", ..."), std::string::npos) << message;

  message = error_of([](Tensors& t) { t.emplace_back("model.extra", Tensor::zeros({2}, DType::kF32)); });
  EXPECT_NE(message.find("1 tensor not expected: model.extra"), std::string::npos) << message;

  message = error_of([](Tensors& t) {
    for (auto& [name, tensor] : t) {
      if (name == "model.layers.0.mlp.experts.2.down_proj.weight") tensor = tensor.reshape({32, 64});
    }
  });
  EXPECT_NE(
      message.find(
          "\"model.layers.0.mlp.experts.2.down_proj.weight\" is [32, 64], expected [64, 32] (config.json: hidden_size, "
          "intermediate_size or lightmoe.widths)"),
      std::string::npos)
      << message;

  message = error_of([](Tensors& t) {
    for (auto& [name, tensor] : t) {
      if (name == "model.norm.weight") tensor = Tensor::zeros(tensor.shape(), DType::kI32);
    }
  });
  EXPECT_NE(message.find("\"model.norm.weight\" is I32, expected a floating type"), std::string::npos) << message;

  message = error_of([](Tensors& t) {
    t.emplace_back("model.layers.0.self_attn.rotary_emb.inv_freq", Tensor::zeros({2}, DType::kF32));
  });
  EXPECT_EQ(message, "loaded");
}

TEST(OlmoeFiles, ExtrasAreReportedInsteadWhenAskedFor) {
  const testing::TempDir dir;
  const std::unique_ptr<Olmoe> model = random_model(tiny_config(), DType::kF32, 1);
  save_model(*model, dir.path(), DType::kF32, int64_t{1} << 30);
  const SafetensorsFile file(dir.path() / "model.safetensors");
  Tensors tensors{{"extra", Tensor::zeros({2}, DType::kF32)}};
  for (const TensorInfo& info : file.tensors()) tensors.emplace_back(info.name, file.read(info.name));
  write_safetensors(dir.path() / "model.safetensors", tensors);
  LoadReport report;
  load_model(dir.path(), DType::kF32, &report);
  EXPECT_EQ(report.unexpected, std::vector<std::string>{"extra"});
  EXPECT_EQ(report.tensors_used + 1, report.tensors_in_file);
}

}  // namespace
}  // namespace lightmoe
