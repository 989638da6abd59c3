#pragma once
// Router of OLMoE (Hugging Face OlmoeSparseMoeBlock / OlmoeTopKRouter):
//   logits = x W^T (f32);  p = softmax(logits) in f32 over ALL slots that are not removed;  (slots, gates) = the K largest p,
//   descending, ties to the lower slot;  gates are NOT renormalised unless `renormalize` (norm_topk_prob: g_k / sum g).
//   A removed slot (removed[e] != 0) has logit -inf before the softmax: p = 0, never chosen (at least K slots remain).
// backward through the full softmax Jacobian. Given dgates [T,K] and dprobs [T,E] (either may be undefined):
//   dp = dprobs + scatter(dgates through the renormalisation);  dlogits = p * (dp - sum_e p dp);
//   dx = dlogits W ('=' or '+=' by accumulate_dx);  dw += dlogits^T x.
// shapes: x, dx [T,D]; w, dw, [E,D]; logits, probs [T,E]; slots i32 [T,K]; gates, dgates [T,K]; removed u8 [E] or undefined.
// dtypes: x f32/bf16/f64; w of x's type or f32/bf16; logits, probs, gates f32 (f64 for f64). The selection is the same for any T.
// writes: '=' except dw ('+=') and dx as told. logits holds the raw values, also of removed slots. Deterministic.
// sim, cuda: at most 1024 slots; a row's logits have the same bits whatever else is in the call; where removed lies on the device, that K
//   slots remain is not checked. With NaN the K slots are different, but not the cpu's.
//
// Load-balancing loss, pooled over all layers and unmasked tokens (Hugging Face load_balancing_loss_func, transformers 4.x):
//   N = L * unmasked tokens;  f_e = (1/N) #{(layer, token, k): slot = e},  P_e = (1/N) sum p_e;  loss = E sum_e f_e P_e
//   (K, not 1, for uniform routing). Only P carries gradient: dprobs[l] = scale * E f_e / N for unmasked tokens, 0 for masked.
// mask u8 [T], 1 = counted; undefined = all. loss f64 [1] '='. dprobs (if not empty) '=' per layer.

#include <vector>

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct Router {
  Tensor x, w, removed;
  int64_t top_k = 0;
  bool renormalize = false;
  Tensor logits, probs, slots, gates;
};
struct RouterBackward {
  Tensor x, w, probs, slots, gates, dgates, dprobs;
  bool renormalize = false, accumulate_dx = false;
  Tensor dx, dw;  // either may be undefined
};
struct LoadBalance {
  std::vector<Tensor> probs, slots;  // one per layer
  Tensor mask;
  Tensor loss;
};
struct LoadBalanceBackward {
  std::vector<Tensor> probs, slots;
  Tensor mask;
  double scale = 1;
  std::vector<Tensor> dprobs;
};
void run(const Router& op);
void check_router(const Router& op);  // what run checks
void run(const RouterBackward& op);
void run(const LoadBalance& op);
void run(const LoadBalanceBackward& op);

}  // namespace lightmoe
