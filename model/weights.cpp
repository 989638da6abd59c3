#include "model/weights.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "model/moe_extension.h"
#include "model/random_weights.h"
#include "runtime/device_room.h"

namespace lightmoe {
namespace {

// A shape without memory.
ParameterPtr declared(const Shape& shape) {
  auto p = std::make_shared<Parameter>();
  p->value = Tensor::borrow(nullptr, shape, DType::kF32);
  return p;
}

void declare_latents(const OlmoeConfig& c, const LayerShape& shape, MoeLayer& layer) {
  const int64_t d = c.hidden_size, f = c.intermediate_size, m = shape.latent_size, rows = shape.projection_rows();
  const bool low_rank = shape.projection_rank > 0, down = shape.latent_down;
  for (int64_t i = 0; i < shape.projections; ++i) {
    layer.projections.push_back({.gate_up = declared({2 * rows, d}),
                                 .down = down ? declared({rows, d}) : nullptr,
                                 .left_gate_up = low_rank ? declared({2 * (m - rows), rows}) : nullptr,
                                 .left_down = low_rank && down ? declared({m - rows, rows}) : nullptr});
  }
  for (const int32_t projection : shape.latent_projection) {
    layer.latents.push_back({.a_gate = declared({f, m}),
                             .a_up = declared({f, m}),
                             .down = down ? nullptr : declared({d, f}),
                             .a_down = down ? declared({f, m}) : nullptr,
                             .mix = shape.latent_mix ? declared({shape.latent_matrices(), shape.projections}) : nullptr,
                             .projection = projection});
  }
}

MoeLayer declare_layer(const OlmoeConfig& c, const LayerShape& shape) {
  MoeLayer layer{.router = declared({c.num_experts, c.hidden_size}),
                 .slots = shape.slots,
                 .experts = {},
                 .adapters = {},
                 .projections = {},
                 .latents = {},
                 .annealed = {}};
  const int64_t d = c.hidden_size, f = c.intermediate_size;
  for (size_t j = 0; j < shape.zero_expert.size(); ++j) {
    const int64_t w = shape.width_of(j, f);
    layer.experts.push_back(shape.stores(j) ? Expert{.gate_up = declared({2 * w, d}), .down = declared({d, w})}
                                            : Expert{});  // zero, or filled in from the layer that stores it
  }
  if (shape.constants > 0) layer.constants = declared({shape.constants, d});
  declare_latents(c, shape, layer);
  for (size_t a = 0; a < shape.adapter_rank.size(); ++a) {
    const int64_t r = shape.adapter_rank[a], w = shape.width_of_adapter(a, f);
    layer.adapters.push_back({.a_gate_up = declared({2 * r, d}),
                              .b_gate = declared({w, r}),
                              .b_up = declared({w, r}),
                              .a_down = declared({r, w}),
                              .b_down = declared({d, r})});
  }
  if (shape.extension.any())
    layer.extension = declare_extension(shape.extension, {.hidden = d, .width = f, .slots = c.num_experts});
  return layer;
}

class Collector {
 public:
  void whole(const std::string& name, const ParameterPtr& p, const char* keys) {
    rows(name, p, 0, p->value.dim(0), keys);
  }
  void rows(const std::string& name, const ParameterPtr& p, int64_t first, int64_t count, const char* keys) {
    list_.push_back({.name = name, .parameter = p, .first_row = first, .rows = count, .config_keys = keys});
  }
  // The two matrices that share one parameter.
  void halves(const std::string& first, const std::string& second, const ParameterPtr& p, const char* keys) {
    const int64_t half = p->value.dim(0) / 2;
    rows(first, p, 0, half, keys);
    rows(second, p, half, half, keys);
  }
  void moe(int64_t l, const MoeLayer& layer, bool plain);
  void latents(int64_t l, const MoeLayer& layer);
  std::vector<StoredTensor> take() { return std::move(list_); }

 private:
  std::vector<StoredTensor> list_;
  std::unordered_set<const Parameter*> experts_;  // of the layers so far
};

void Collector::latents(int64_t l, const MoeLayer& layer) {
  constexpr ExpertMatrix kGate = ExpertMatrix::kGate, kUp = ExpertMatrix::kUp, kDown = ExpertMatrix::kDown;
  for (size_t i = 0; i < layer.projections.size(); ++i) {
    const Projection& p = layer.projections[i];
    const auto part = [&](ExpertMatrix m) { return projection_tensor_name(l, static_cast<int64_t>(i), m); };
    const auto left = [&](ExpertMatrix m) { return left_tensor_name(l, static_cast<int64_t>(i), m); };
    const char *rows_keys = "lightmoe.latents.size or .rank, hidden_size",
               *left_keys = "lightmoe.latents.size, lightmoe.latents.rank";
    halves(part(kGate), part(kUp), p.gate_up, rows_keys);
    if (p.down != nullptr) whole(part(kDown), p.down, rows_keys);
    if (p.left_gate_up != nullptr) halves(left(kGate), left(kUp), p.left_gate_up, left_keys);
    if (p.left_down != nullptr) whole(left(kDown), p.left_down, left_keys);
  }
  for (size_t i = 0; i < layer.latents.size(); ++i) {
    const Latent& latent = layer.latents[i];
    const auto index = static_cast<int64_t>(i);
    const char* factor_keys = "intermediate_size, lightmoe.latents.size";
    whole(latent_tensor_name(l, index, kGate), latent.a_gate, factor_keys);
    whole(latent_tensor_name(l, index, kUp), latent.a_up, factor_keys);
    if (latent.down != nullptr)
      whole(latent_tensor_name(l, index, kDown), latent.down, "hidden_size, intermediate_size");
    else
      whole(latent_tensor_name(l, index, kDown), latent.a_down, factor_keys);
    if (latent.mix != nullptr) whole(mix_tensor_name(l, index), latent.mix, "lightmoe.latents.projections");
  }
}

void Collector::moe(int64_t l, const MoeLayer& layer, bool plain) {
  whole(fmt::format("model.layers.{}.mlp.gate.weight", l), layer.router, "num_experts, hidden_size");
  const auto name = [&](size_t e, ExpertMatrix m) {
    const auto entry = static_cast<int64_t>(e);
    return plain ? expert_tensor_name(l, entry, m) : bank_tensor_name(l, entry, m);
  };
  for (size_t e = 0; e < layer.experts.size(); ++e) {
    const Expert& expert = layer.experts[e];
    if (expert.gate_up == nullptr || !experts_.insert(expert.gate_up.get()).second) continue;
    halves(name(e, ExpertMatrix::kGate), name(e, ExpertMatrix::kUp), expert.gate_up,
           "intermediate_size or lightmoe.widths, hidden_size");
    whole(name(e, ExpertMatrix::kDown), expert.down, "hidden_size, intermediate_size or lightmoe.widths");
  }
  if (layer.constants != nullptr) whole(constants_tensor_name(l), layer.constants, "lightmoe.constants, hidden_size");
  latents(l, layer);
  for (size_t i = 0; i < layer.adapters.size(); ++i) {
    const Adapter& a = layer.adapters[i];
    const auto index = static_cast<int64_t>(i);
    const auto adapter = [&](ExpertMatrix m, bool b) { return adapter_tensor_name(l, index, m, b); };
    halves(adapter(ExpertMatrix::kGate, false), adapter(ExpertMatrix::kUp, false), a.a_gate_up,
           "lightmoe.adapters, hidden_size");
    whole(adapter(ExpertMatrix::kGate, true), a.b_gate, "intermediate_size, lightmoe.adapters");
    whole(adapter(ExpertMatrix::kUp, true), a.b_up, "intermediate_size, lightmoe.adapters");
    whole(adapter(ExpertMatrix::kDown, false), a.a_down, "lightmoe.adapters, intermediate_size");
    whole(adapter(ExpertMatrix::kDown, true), a.b_down, "hidden_size, lightmoe.adapters");
  }
  if (layer.extension == nullptr) return;
  for (const ExtensionTensor& t : layer.extension->tensors()) {
    whole(extension_tensor_name(l, layer.extension->shape().kind, t.name), t.parameter,
          "hidden_size, lightmoe.extension");
  }
}

}  // namespace

std::vector<int64_t> StoredTensor::shape() const {
  const Shape& whole = parameter->value.shape();
  std::vector<int64_t> dims{rows};
  for (int i = 1; i < whole.rank(); ++i) dims.push_back(whole[i]);
  return dims;
}

bool is_plain(const Olmoe& model) {
  return model.config.lightmoe_json.empty() &&
         std::all_of(model.blocks.begin(), model.blocks.end(), [](const Block& block) { return block.moe.is_plain(); });
}

std::vector<LayerShape> shapes_of(const Olmoe& model) {
  std::vector<LayerShape> shapes;
  std::unordered_map<const Parameter*, BankRef> owners;
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    const MoeLayer& moe = model.blocks[l].moe;
    LayerShape& shape = shapes.emplace_back(shape_of(moe, model.config.intermediate_size));
    for (size_t j = 0; j < moe.experts.size(); ++j) {
      if (moe.experts[j].gate_up == nullptr) continue;
      const BankRef here{static_cast<int32_t>(l), static_cast<int32_t>(j)};
      const auto [owner, is_new] = owners.try_emplace(moe.experts[j].gate_up.get(), here);
      if (is_new) continue;
      shape.borrowed.resize(moe.experts.size());
      shape.borrowed[j] = owner->second;
    }
  }
  return shapes;
}

std::vector<StoredTensor> stored_tensors(const Olmoe& model) {
  Collector all;
  const bool plain = is_plain(model);
  all.whole("model.embed_tokens.weight", model.embedding, "vocab_size, hidden_size");
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    const Block& block = model.blocks[l];
    const AttentionWeights& a = block.attention;
    const std::string prefix = fmt::format("model.layers.{}.", l);
    const auto attention = [&](const char* name, const ParameterPtr& p, const char* keys) {
      all.whole(fmt::format("{}self_attn.{}.weight", prefix, name), p, keys);
    };
    all.whole(prefix + "input_layernorm.weight", block.input_norm, "hidden_size");
    attention("q_proj", a.q, "hidden_size");
    attention("k_proj", a.k, "num_key_value_heads, num_attention_heads, hidden_size");
    attention("v_proj", a.v, "num_key_value_heads, num_attention_heads, hidden_size");
    attention("o_proj", a.o, "hidden_size");
    attention("q_norm", a.q_norm, "hidden_size");
    attention("k_norm", a.k_norm, "num_key_value_heads, num_attention_heads, hidden_size");
    all.whole(prefix + "post_attention_layernorm.weight", block.post_attention_norm, "hidden_size");
    all.moe(static_cast<int64_t>(l), block.moe, plain);
  }
  all.whole("model.norm.weight", model.final_norm, "hidden_size");
  if (model.lm_head != model.embedding) all.whole("lm_head.weight", model.lm_head, "vocab_size, hidden_size");
  return all.take();
}

std::unique_ptr<Olmoe> declare_model(const OlmoeConfig& config, const std::vector<LayerShape>& layers) {
  require(static_cast<int64_t>(layers.size()) == config.num_layers, "declare_model: {} layer shapes for {} layers",
          layers.size(), config.num_layers);
  auto model = std::make_unique<Olmoe>();
  model->config = config;
  const int64_t d = config.hidden_size, kv = config.num_kv_heads * config.head_dim();
  model->embedding = declared({config.vocab_size, d});
  for (const LayerShape& shape : layers) {
    model->blocks.push_back({.input_norm = declared({d}),
                             .post_attention_norm = declared({d}),
                             .attention = {.q = declared({d, d}),
                                           .k = declared({kv, d}),
                                           .v = declared({kv, d}),
                                           .o = declared({d, d}),
                                           .q_norm = declared({d}),
                                           .k_norm = declared({kv})},
                             .moe = declare_layer(config, shape)});
  }
  for (size_t l = 0; l < layers.size(); ++l) {
    for (size_t j = 0; j < layers[l].borrowed.size(); ++j) {
      const BankRef& from = layers[l].borrowed[j];
      if (from.layer < 0) continue;
      const MoeLayer& owner = model->blocks[static_cast<size_t>(from.layer)].moe;
      model->blocks[l].moe.experts[j] = owner.experts[static_cast<size_t>(from.entry)];
    }
  }
  model->final_norm = declared({d});
  model->lm_head = config.tie_word_embeddings ? model->embedding : declared({config.vocab_size, d});
  name_parameters(*model);
  return model;
}

void allocate_weights(Olmoe& model, DType dtype) {
  require_device_room(model.num_parameters() * static_cast<int64_t>(size_of(dtype)),
                      fmt::format("a model of {} parameters in {}", model.num_parameters(), name_of(dtype)),
                      "choose a smaller type (--dtype bf16) or a compressed model");
  const MemoryScope scope(MemoryCategory::kWeights);
  for (const ParameterPtr& p : model.parameters()) p->value = Tensor::empty(p->value.shape(), dtype);
}

ParameterPtr make_parameter(const std::string& name, const Shape& shape, DType dtype) {
  const MemoryScope scope(MemoryCategory::kWeights);
  auto p = std::make_shared<Parameter>();
  p->name = name;
  p->value = Tensor::empty(shape, dtype);
  return p;
}

void name_parameters(Olmoe& model) {
  for (const StoredTensor& stored : stored_tensors(model)) {
    std::string name = stored.name;
    if (stored.rows != stored.parameter->value.dim(0)) {
      if (stored.first_row != 0) continue;
      const size_t at = name.rfind("gate");  // gate_proj.weight or gate_a: the first of two
      name.replace(at, 4, "gate_up");
    }
    stored.parameter->name = name;
  }
}

std::unique_ptr<Olmoe> random_model(const OlmoeConfig& config, DType dtype, uint64_t seed) {
  const std::vector<LayerShape> layers(static_cast<size_t>(config.num_layers), plain_layer_shape(config.num_experts));
  std::unique_ptr<Olmoe> model = declare_model(config, layers);
  allocate_weights(*model, dtype);
  for (const StoredTensor& stored : stored_tensors(*model)) {
    const Tensor rows = stored.view(stored.parameter->value);
    const Tensor values = dtype == DType::kF32 ? rows : Tensor::empty(rows.shape(), DType::kF32);
    fill_random_weight(config, stored.name, seed, values);
    if (dtype != DType::kF32) rows.copy_from(values);
  }
  return model;
}

}  // namespace lightmoe
