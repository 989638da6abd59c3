#include "model/parameter_table.h"

#include <fmt/core.h>

#include <functional>

#include "model/moe_extension.h"

namespace lightmoe {
namespace {

using List = std::vector<ParameterInfo>;

void add_attention(List& list, const OlmoeConfig& c, int64_t layer) {
  const std::string prefix = fmt::format("model.layers.{}.self_attn.", layer);
  const int64_t d = c.hidden_size, kv = c.num_kv_heads * c.head_dim();
  const auto add = [&](const char* name, std::vector<int64_t> shape, ParameterKind kind) {
    list.push_back({prefix + name, std::move(shape), kind, layer});
  };
  add("q_proj.weight", {d, d}, ParameterKind::kAttention);
  add("k_proj.weight", {kv, d}, ParameterKind::kAttention);
  add("v_proj.weight", {kv, d}, ParameterKind::kAttention);
  add("o_proj.weight", {d, d}, ParameterKind::kAttention);
  add("q_norm.weight", {d}, ParameterKind::kNorm);
  add("k_norm.weight", {kv}, ParameterKind::kNorm);
}

// Everything but the experts, which `add_experts` puts in after each router.
List with_experts(const OlmoeConfig& c, const std::function<void(List&, int64_t layer)>& add_experts) {
  List list;
  const int64_t d = c.hidden_size;
  list.push_back({"model.embed_tokens.weight", {c.vocab_size, d}, ParameterKind::kEmbedding});
  for (int64_t l = 0; l < c.num_layers; ++l) {
    const std::string prefix = fmt::format("model.layers.{}.", l);
    list.push_back({prefix + "input_layernorm.weight", {d}, ParameterKind::kNorm, l});
    add_attention(list, c, l);
    list.push_back({prefix + "post_attention_layernorm.weight", {d}, ParameterKind::kNorm, l});
    list.push_back({prefix + "mlp.gate.weight", {c.num_experts, d}, ParameterKind::kRouter, l});
    add_experts(list, l);
  }
  list.push_back({"model.norm.weight", {d}, ParameterKind::kNorm});
  if (!c.tie_word_embeddings) list.push_back({"lm_head.weight", {c.vocab_size, d}, ParameterKind::kHead});
  return list;
}

std::vector<int64_t> expert_shape(const OlmoeConfig& c, ExpertMatrix matrix, int64_t width) {
  if (matrix == ExpertMatrix::kDown) return {c.hidden_size, width};
  return {width, c.hidden_size};
}

void add_adapter(List& list, const OlmoeConfig& c, int64_t layer, size_t index, const LayerShape& layer_shape) {
  const int64_t rank = layer_shape.adapter_rank[index],
                width = layer_shape.width_of_adapter(index, c.intermediate_size);
  const auto adapter = static_cast<int64_t>(index);
  for (const ExpertMatrix matrix : kExpertMatrices) {
    const std::vector<int64_t> shape = expert_shape(c, matrix, width);
    list.push_back(
        {adapter_tensor_name(layer, adapter, matrix, false), {rank, shape[1]}, ParameterKind::kAdapter, layer});
    list.push_back(
        {adapter_tensor_name(layer, adapter, matrix, true), {shape[0], rank}, ParameterKind::kAdapter, layer});
  }
}

void add_extension(List& list, const OlmoeConfig& c, int64_t layer, const ExtensionShape& extension) {
  const MoeDims dims{.hidden = c.hidden_size, .width = c.intermediate_size, .slots = c.num_experts};
  for (const ExtensionTensor& tensor : declare_extension(extension, dims)->tensors()) {
    const Shape& shape = tensor.parameter->value.shape();
    ParameterInfo info{extension_tensor_name(layer, extension.kind, tensor.name), {}, ParameterKind::kExtension, layer};
    for (int i = 0; i < shape.rank(); ++i) info.shape.push_back(shape[i]);
    list.push_back(std::move(info));
  }
}

void add_constants_and_latents(List& list, const OlmoeConfig& c, int64_t layer, const LayerShape& shape) {
  const int64_t d = c.hidden_size, f = c.intermediate_size, m = shape.latent_size;
  const ParameterKind latent = ParameterKind::kLatent;
  if (shape.constants > 0) {
    list.push_back({constants_tensor_name(layer), {shape.constants, d}, ParameterKind::kConstant, layer});
  }
  const auto is_factor = [&](ExpertMatrix matrix) { return matrix != ExpertMatrix::kDown || shape.latent_down; };
  const int64_t rows = shape.projection_rows();
  for (int64_t i = 0; i < shape.projections; ++i) {
    for (const ExpertMatrix matrix : kExpertMatrices) {
      if (!is_factor(matrix)) continue;
      list.push_back({projection_tensor_name(layer, i, matrix), {rows, d}, latent, layer});
      if (rows < m) list.push_back({left_tensor_name(layer, i, matrix), {m - rows, rows}, latent, layer});
    }
  }
  for (size_t i = 0; i < shape.latent_projection.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    for (const ExpertMatrix matrix : kExpertMatrices) {
      const std::vector<int64_t> dims = is_factor(matrix) ? std::vector{f, m} : std::vector{d, f};
      list.push_back({latent_tensor_name(layer, index, matrix), dims, latent, layer});
    }
    if (shape.latent_mix) {
      list.push_back({mix_tensor_name(layer, index), {shape.latent_matrices(), shape.projections}, latent, layer});
    }
  }
}

}  // namespace

std::string_view name_of(ParameterKind kind) {
  switch (kind) {
    case ParameterKind::kEmbedding:
      return "embedding";
    case ParameterKind::kNorm:
      return "norm";
    case ParameterKind::kAttention:
      return "attention";
    case ParameterKind::kRouter:
      return "router";
    case ParameterKind::kExpert:
      return "experts";
    case ParameterKind::kConstant:
      return "constants";
    case ParameterKind::kLatent:
      return "latents";
    case ParameterKind::kAdapter:
      return "adapters";
    case ParameterKind::kExtension:
      return "extension";
    case ParameterKind::kHead:
      return "lm_head";
  }
  return "?";
}

int64_t ParameterInfo::numel() const {
  int64_t count = 1;
  for (const int64_t dim : shape) count *= dim;
  return count;
}

std::string fused_tensor_name(int64_t layer, bool down) {
  return fmt::format("model.layers.{}.mlp.experts.{}", layer, down ? "down_proj" : "gate_up_proj");
}

List stock_parameters(const OlmoeConfig& c, ExpertLayout layout) {
  return with_experts(c, [&](List& list, int64_t l) {
    if (layout == ExpertLayout::kFused) {
      list.push_back({fused_tensor_name(l, false),
                      {c.num_experts, 2 * c.intermediate_size, c.hidden_size},
                      ParameterKind::kExpert,
                      l});
      list.push_back(
          {fused_tensor_name(l, true), {c.num_experts, c.hidden_size, c.intermediate_size}, ParameterKind::kExpert, l});
      return;
    }
    for (int64_t e = 0; e < c.num_experts; ++e) {
      for (const ExpertMatrix m : kExpertMatrices) {
        list.push_back(
            {expert_tensor_name(l, e, m), expert_shape(c, m, c.intermediate_size), ParameterKind::kExpert, l});
      }
    }
  });
}

List compressed_parameters(const OlmoeConfig& c, const std::vector<LayerShape>& layers) {
  return with_experts(c, [&](List& list, int64_t l) {
    const LayerShape& shape = layers[static_cast<size_t>(l)];
    for (size_t j = 0; j < shape.zero_expert.size(); ++j) {
      if (!shape.stores(j)) continue;  // stands for W = 0, or another layer stores it
      const int64_t width = shape.width_of(j, c.intermediate_size);
      for (const ExpertMatrix m : kExpertMatrices) {
        list.push_back(
            {bank_tensor_name(l, static_cast<int64_t>(j), m), expert_shape(c, m, width), ParameterKind::kExpert, l});
      }
    }
    add_constants_and_latents(list, c, l, shape);
    for (size_t a = 0; a < shape.adapter_rank.size(); ++a) {
      add_adapter(list, c, l, a, shape);
    }
    if (shape.extension.any()) add_extension(list, c, l, shape.extension);
  });
}

}  // namespace lightmoe
