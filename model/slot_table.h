#pragma once
// The shape of compressed MoE layers as text and as tensor names: what the "lightmoe" object of config.json says, so that a
// reader can check every tensor before it allocates one. Used by load_model, save_model and the streaming compressor.
//   {"format": 1, "method": {..}, "layers": [{"experts": 29, "zero_experts": [], "adapters": [16, ..],
//     "slots": {"expert": [0, 1, ..], "adapter": [0, 1, ..]}}, ..]}
//   experts       entries of the bank; those in zero_experts stand for W = 0 and have no tensors (Replace without shared base)
//   adapters      rank of each adapter;  slots.expert / slots.adapter: bank and adapter index per slot, -1 = none
//   slots.kind    only when a slot is not of kind expert: "expert", "constant", "latent", "removed"
//   widths        units F_e of each entry's expert, [2F_e,D] and [D,F_e], where some are narrower than intermediate_size; an adapter
//                 is as wide as the expert of its slots. Zero entries have full width, borrowed ones that of their owner
//   wide_adapters true where adapters have intermediate_size units whatever the expert of their slots has
//   borrowed      [[entry, layer, entry there], ..]: entries that are another (lower) layer's stored expert; nothing is stored here
//   constants     rows of mlp.constants;  slots.constant: row per slot
//   extension     {"kind": "pesc", settings}: model/moe_extension.h
//   latents       {"size": M, "projections": n, "projection": [of each latent]};  slots.latent: index per slot.  "down": true where down
//                 matrices are factors too;  "mix": "silu" where projections are mixed (then every "projection" is -1), with "rank": K
//                 where they are of rank K, 0 < K < M
// Keys that would be empty are left out.
// Every index is checked; an adapter belongs to slots of one expert; at least K slots are not removed.

#include <cstdint>
#include <string>
#include <vector>

#include "loaders/json_type.h"
#include "model/config.h"
#include "model/extension_shape.h"
#include "model/moe.h"

namespace lightmoe {

struct BankRef {
  int32_t layer = -1, entry = -1;  // layer -1: none
};

struct LayerShape {
  std::vector<Slot> slots;            // E
  std::vector<uint8_t> zero_expert;   // one per bank entry: 1 = W = 0, nothing stored
  std::vector<int64_t> adapter_rank;  // one per adapter
  std::vector<int64_t> widths;        // empty = all as wide as the config says, else one per bank entry
  bool wide_adapters = false;         // adapters have full width beside narrower experts
  std::vector<BankRef> borrowed;      // empty, or one per bank entry: where another layer stores it
  int64_t constants = 0;
  int64_t latent_size = 0, projections = 0;      // M, and how many [2M,D]
  std::vector<int32_t> latent_projection;        // one per latent, -1 when mixed
  bool latent_down = false, latent_mix = false;  // down matrices are factors; projections are mixed (model/moe.h)
  int64_t projection_rank = 0;                   // K of mixed projections, 0 = stored as they are
  ExtensionShape extension;                      // of kind "" = none

  // F_e of a bank entry and of an adapter; `full` is the config's intermediate_size, which latents have.
  int64_t width_of(size_t entry, int64_t full) const { return widths.empty() ? full : widths[entry]; }
  int64_t width_of_adapter(size_t adapter, int64_t full) const;
  bool has_latents() const { return !latent_projection.empty(); }
  int64_t latent_matrices() const { return latent_down ? 3 : 2; }  // that are factors
  // Rows of B that are stored for each matrix: M, or K.
  int64_t projection_rows() const { return projection_rank > 0 ? projection_rank : latent_size; }
  int64_t projection_parameters(int64_t hidden) const;            // of one of them
  int64_t latent_parameters(int64_t hidden, int64_t full) const;  // of one latent
  bool stores(size_t entry) const { return !zero_expert[entry] && (borrowed.empty() || borrowed[entry].layer < 0); }
};

// The stock layer: slot i owns expert i.
LayerShape plain_layer_shape(int64_t num_slots);
LayerShape shape_of(const MoeLayer& layer, int64_t full_width);  // as if no other layer had its experts
// Bank entries, adapters and slots are numbered as in the shape; `method` (may be null) is kept as it is.
Json slot_tables_to_json(const std::vector<LayerShape>& layers, const Json& method);
// Error(kInput) starting with `name`, with layer, key, value and legal range.
std::vector<LayerShape> slot_tables_from_json(const Json& object, const OlmoeConfig& config, const std::string& name);

enum class ExpertMatrix : uint8_t { kGate, kUp, kDown };
inline constexpr ExpertMatrix kExpertMatrices[] = {ExpertMatrix::kGate, ExpertMatrix::kUp, ExpertMatrix::kDown};
// model.layers.L.mlp.experts.J.gate_proj.weight (stock), model.layers.L.mlp.bank.J.gate_proj.weight (compressed),
// model.layers.L.mlp.adapters.J.gate_a, .gate_b
std::string expert_tensor_name(int64_t layer, int64_t expert, ExpertMatrix matrix);
std::string bank_tensor_name(int64_t layer, int64_t entry, ExpertMatrix matrix);
std::string adapter_tensor_name(int64_t layer, int64_t adapter, ExpertMatrix matrix, bool b);
// model.layers.L.mlp.constants;  model.layers.L.mlp.projections.J.gate, .up, .down [M,D] (of rank K [K,D] and .gate_left, .. [M-K,K]);
// model.layers.L.mlp.latents.J.gate, .up [F,M], .down [D,F] (as a factor [F,M]), .mix [2,n] or [3,n]
std::string constants_tensor_name(int64_t layer);
std::string projection_tensor_name(int64_t layer, int64_t projection, ExpertMatrix matrix);
std::string left_tensor_name(int64_t layer, int64_t projection, ExpertMatrix matrix);
std::string latent_tensor_name(int64_t layer, int64_t latent, ExpertMatrix matrix);
std::string mix_tensor_name(int64_t layer, int64_t latent);

}  // namespace lightmoe
