#pragma once
// What the model benchmarks share: one model in memory at a time, original or compressed, with its training state; what a pass over
// it computes and reads.
//   original     the stock model, weights random
//   lightmoe-N   the same after expert replacing, N % of the whole model removed: 3 bases a layer, adapters of rank 16 on replaced slots
//   recovery     lightmoe-50 as it trains: adapters on every slot; bases and adapters train, in f32, the rest is frozen
//   annealing    recovery while the originals are still blended in (beta 0.5)

#include <memory>
#include <string>

#include "autograd/optimizer.h"
#include "bench/ceilings.h"
#include "model/olmoe.h"

namespace lightmoe::bench {

enum class ModelKind : uint8_t { kOriginal, kLightMoe30, kLightMoe40, kLightMoe50, kRecovery, kAnnealing };
inline bool is_for_inference(ModelKind kind) {  // compressed, and nothing of it trains
  return kind == ModelKind::kLightMoe30 || kind == ModelKind::kLightMoe40 || kind == ModelKind::kLightMoe50;
}

// FLOPs and bytes of weights of a pass as it was routed: a stored expert counts once per token.
struct PassWork {
  double linear_flop = 0, trained_flop = 0, score_flop = 0;  // trained: the part of linear whose matrix trains
  double weight_bytes = 0;                                   // of a pass that reads each used matrix once per token
  double forward_flop() const { return linear_flop + score_flop; }
  double step_flop() const {
    return 2 * linear_flop + trained_flop + 3 * score_flop;
  }  // scores: two products, then four
};

// Random weights of that shape, compressed as the kind says.
std::unique_ptr<Olmoe> make_model(const OlmoeConfig& config, DType weights, ModelKind kind);

class ModelSession {
 public:
  // The model of that key; loads, compresses in place or replaces what is in memory. One session per process.
  static ModelSession& get(const std::string& shape, DType weights, ModelKind kind);

  Olmoe& model() { return *model_; }
  PassWork count(const Batch& batch, bool all_logits);
  // Of `count` tokens decoded one by one; the mean position is `length`.
  PassWork count_decode(const Batch& batch, int64_t length);
  // Two steps unless this session has trained: gradients, moments and memory are then in place.
  void start_training(const Batch& batch, GemmCompute compute);
  // `passes` forward and backward passes over the batch, then clip and AdamW.
  void train_step(const Batch& batch, GemmCompute compute, int64_t passes = 1);
  // Bytes of the original's weights, of the same dtype.
  int64_t original_bytes() const;

 private:
  std::unique_ptr<Olmoe> model_;
  std::unique_ptr<Optimizer> optimizer_;
  std::string shape_;
  DType weights_ = DType::kF32;
  ModelKind kind_ = ModelKind::kOriginal;
};

}  // namespace lightmoe::bench
