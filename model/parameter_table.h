#pragma once
// Which tensors a model of a config has on disk, by name, shape and kind: the one list that random weights, verify, inspect and
// the readers share. Names as Hugging Face writes them (modeling_olmoe.py), or model/slot_table.h for compressed layers.

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/slot_table.h"

namespace lightmoe {

enum class ParameterKind : uint8_t {
  kEmbedding,
  kNorm,
  kAttention,
  kRouter,
  kExpert,
  kConstant,
  kLatent,
  kAdapter,
  kExtension,
  kHead
};
inline constexpr int kNumParameterKinds = 10;
std::string_view name_of(ParameterKind kind);  // "embedding", "norm", ...

struct ParameterInfo {
  std::string name;
  std::vector<int64_t> shape;
  ParameterKind kind;
  int64_t layer = -1;
  int64_t numel() const;
};

enum class ExpertLayout : uint8_t {
  kPerExpert,  // mlp.experts.E.{gate,up,down}_proj.weight
  kFused,  // mlp.experts.gate_up_proj [E,2F,D] (gate rows first) and mlp.experts.down_proj [E,D,F], as transformers 5 holds them
};
// A stock model, in the order of the forward pass.
std::vector<ParameterInfo> stock_parameters(const OlmoeConfig& config, ExpertLayout layout = ExpertLayout::kPerExpert);
// A compressed one; layers as slot_tables_from_json gives them.
std::vector<ParameterInfo> compressed_parameters(const OlmoeConfig& config, const std::vector<LayerShape>& layers);
std::string fused_tensor_name(int64_t layer, bool down);

}  // namespace lightmoe
