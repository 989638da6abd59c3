#pragma once
// OLMoE (Hugging Face modeling_olmoe.py OlmoeForCausalLM): embedding, L blocks of
//   x += O(attention(rope(clip(q_norm(Q n1))), rope(clip(k_norm(K n1))), clip(V n1)));  x += moe(n2),  n = RMSNorm(x)
// final RMSNorm, LM head. q_norm and k_norm act on the whole projection width, before the split into heads.
// Activations are f32 on the CPU; weights are f32 or bf16 in memory; `compute` says in what type products are made.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "autograd/parameter.h"
#include "kernels/attention.h"
#include "kernels/gemm.h"
#include "model/config.h"
#include "model/moe.h"
#include "model/routing.h"

namespace lightmoe {

struct AttentionWeights {
  ParameterPtr q, k, v, o, q_norm, k_norm;  // [H*Hd,D] [Hkv*Hd,D] [Hkv*Hd,D] [D,H*Hd] [H*Hd] [Hkv*Hd]
};
struct Block {
  ParameterPtr input_norm, post_attention_norm;
  AttentionWeights attention;
  MoeLayer moe;
};

// T tokens of any number of sequences, packed or padded. labels[t] is the id to predict AFTER token t, or -100.
struct Batch {
  Tensor ids, labels, positions;  // i32 [T]; labels may be undefined
  AttentionSequences sequences;   // key rows are this batch's own rows (no cache)
  int64_t num_labels = 0;         // rows with a label
  Tensor mask;                    // u8 [T], 0 = padding (left out of the aux loss), undefined = all real
  int64_t tokens() const { return ids.dim(0); }
};
// B rows of S ids (row-major). attention_mask u8 [B*S] (right or left padded rows) and labels as in the file (unshifted,
// Hugging Face style: shifted here) may be empty.
Batch make_batch(const std::vector<int32_t>& ids, int64_t rows, int64_t length,
                 const std::vector<int32_t>& hf_labels = {}, const std::vector<uint8_t>& attention_mask = {});
// Packed rows: doc_begin as in loaders/dataset.h TokenRows (labels already aligned).
Batch make_packed_batch(const std::vector<int32_t>& ids, const std::vector<int32_t>& labels,
                        const std::vector<int32_t>& positions, const std::vector<int32_t>& doc_begin);

// What a layer's router saw and chose; handed to observers (calibration, dump).
struct RouterView {
  int layer;
  Tensor x;                            // [T,D] input of the MoE block (after post_attention_norm)
  Tensor logits, probs, slots, gates;  // [T,E] [T,E] i32 [T,K] [T,K]
};
struct Observer {
  std::function<void(int layer, const Tensor& hidden)> on_hidden;  // input of layer i; i = L: after the final norm
  std::function<void(const RouterView&)> on_router;
};

class KvCache {  // keys and values of N sequences, f32 or bf16 (category kv_cache)
 public:
  KvCache(const OlmoeConfig& config, int64_t sequences, int64_t max_length, DType dtype);
  std::vector<Tensor> k, v;      // per layer [N*max_length, Hkv*Hd]
  std::vector<int32_t> lengths;  // used positions per sequence
  int64_t max_length = 0;
};

enum class Recompute : uint8_t { kNone, kMoe, kBlock };  // what backward recomputes instead of keeping

struct ForwardOptions {
  GemmCompute compute = GemmCompute::kF32;
  const Observer* observer = nullptr;
  const RoutingOptions* routing = nullptr;  // lives as long as the pass
};
struct TrainOptions {
  GemmCompute compute = GemmCompute::kF32;
  double loss_scale = 1;  // 1 / unmasked labels of the whole optimizer step
  double aux_coef = 0;    // times aux_scale: router_aux_loss_coef or a flag
  double aux_scale = 1;   // 1 / micro-batches of the step
  Recompute recompute = Recompute::kNone;
  double entropy_coef = 0;   // times aux_scale: of the router probabilities' mean entropy
  double sparsity_coef = 0;  // times aux_scale: of the mean openness of blocks of units (model/moe_extension.h)
  const Observer* observer = nullptr;  // with Recompute::kBlock routers are seen twice
};
struct TrainLosses {
  double ce_sum = 0;  // sum over unmasked labels (not scaled)
  int64_t labels = 0;
  double aux = 0;
  double entropy = 0;  // mean over layers and unmasked tokens, only where it is asked for
  double open = 0;     // likewise, of the gates of blocks of units
};

class Olmoe {
 public:
  OlmoeConfig config;
  ParameterPtr embedding, final_norm, lm_head;  // lm_head is embedding when tied
  std::vector<Block> blocks;

  std::vector<ParameterPtr> parameters() const;  // fixed order; names unique
  void set_trainable(const std::function<bool(const std::string& name)>& rule);
  int64_t num_parameters() const;
  int64_t stored_bytes() const;

  // Final hidden states [T,D] (after the last norm), no gradients kept.
  Tensor forward(const Batch& batch, const ForwardOptions& options) const;
  // New tokens of each cached sequence (token counts per sequence in `counts`, ids flat); appends to the cache.
  Tensor forward_cached(const std::vector<int32_t>& ids, const std::vector<int32_t>& counts, KvCache& cache,
                        const ForwardOptions& options) const;
  Tensor logits(const Tensor& hidden, const ForwardOptions& options) const;  // [T,V] f32; small T only
  // One micro-batch: adds the gradients of loss_scale * CE_sum + aux_coef * aux_scale * aux to the trainable parameters.
  TrainLosses forward_backward(const Batch& batch, const TrainOptions& options);
};

// Reads a stock or a compressed (lightmoe) directory. dtype: f32 or bf16 in memory. Experts may be per-expert or fused tensors.
// Missing and unexpected tensors, wrong shapes: Error(kInput) with the first few and the count. report: a coverage account.
struct LoadReport {
  int64_t tensors_in_file = 0, tensors_used = 0;
  std::vector<std::string> unexpected;
};
std::unique_ptr<Olmoe> load_model(const std::filesystem::path& directory, DType dtype, LoadReport* report = nullptr);
// Random weights: normal(0, initializer_range), norms 1; parameter p from Philox(seed, hash of its name).
std::unique_ptr<Olmoe> random_model(const OlmoeConfig& config, DType dtype, uint64_t seed);
// Writes config.json and safetensors into a directory being prepared (loaders/output.h); per-expert Hugging Face names for a plain
// model, lightmoe names (below) and the "lightmoe" config object else.
//   model.layers.L.mlp.bank.J.{gate_proj,up_proj,down_proj}.weight     stored expert J of layer L
//   model.layers.L.mlp.adapters.J.{gate,up,down}_{a,b}                 adapter J
void save_model(const Olmoe& model, const std::filesystem::path& directory, DType dtype, int64_t max_shard_bytes);

}  // namespace lightmoe
