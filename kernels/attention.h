#pragma once
// Causal softmax attention with grouped queries, over any number of sequences of any length
// (Hugging Face eager_attention_forward; blockwise with running maximum as FlashAttention, arXiv 2205.14135):
//   sequence n owns query rows [q_begin[n], q_begin[n+1]) and key/value rows [k_begin[n], k_begin[n] + k_count[n]);
//   query j of it (0-based) sees keys 0 .. min(k_count[n], q_pos[n] + j + 1) - 1; none: its output is 0, lse -inf.
//   out = softmax(q k^T / sqrt(Hd)) v;  query head h uses key head h / (H / Hkv).  lse = log sum exp of the scaled scores.
// Covers packed training (q_pos 0, k rows = q rows), right and left padding, prefill into a cache, and decode.
// shapes: q, out, dq, dout [Tq, H*Hd]; k, v, dk, dv [Tk, Hkv*Hd]; lse [H, Tq]; q_begin i32 [N+1]; k_begin, k_count, q_pos i32 [N].
// dtypes: q, k, v, out f32/bf16/f64 (one type; k, v may be bf16 under f32 q); lse f32 (f64); all sums f32 (f64).
// writes: out, lse, dq, dk, dv with '='. dk, dv rows that no sequence owns become 0. lse undefined = not kept.
//   Key ranges of different sequences do not overlap in backward.
// memory: beside the arguments, per thread some tiles, in backward also dq of one sequence and key head: never Tq x Tk.
// Deterministic. A query's result has the same bits whatever else is in the call, wherever its keys lie, and in prefill and decode
//   alike (CPU: keys are taken in blocks of 64 counted from key 0, masked keys add exact zeros; values must be finite).
// sim, cuda: head_dim at most 256; the sequences lie on the device and are not checked. bf16 with head_dim 64 or 128 runs on the tensor
//   cores (mma.sync), where probabilities and score gradients are rounded to bf16 before they multiply; all else multiplies in f32.
//   On compute capability 9.0 the passes of training (lse kept, and backward) run on wgmma where every query head has its own key head: the
//   same, but the sums of a row run otherwise than in decode, so that there the promise above is of training's calls among themselves.
//   LIGHTMOE_ATTENTION=mma (default: auto), or set_attention_takes_wgmma(false), keeps mma.sync.
//   The promise above is kept by construction (blocks of 64 keys in parts of 256, each part with its own maximum, parts merged in order
//   by one block or, in decode, by a second kernel; every multiply-add is a fused one): tested on the simulator, not yet on a GPU.
//   Scratch: decode at most 256 MiB of parts; backward one f32 for each query and head. Backward recomputes the scores twice (14 instead
//   of 10 FLOPs), so that blocks share no sums.
// cost: 4 Hd H FLOPs per (query, key) pair forward, 10 backward.

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct AttentionSequences {
  Tensor q_begin, k_begin, k_count, q_pos;
  int64_t max_k_count = 0;  // a bound of k_count known to the host (0: none), by which devices cut long caches
};
struct Attention {
  Tensor q, k, v;
  AttentionSequences sequences;
  int64_t head_dim = 0;
  Tensor out, lse;
};
struct AttentionBackward {
  Tensor q, k, v, out, lse, dout;
  AttentionSequences sequences;
  int64_t head_dim = 0;
  Tensor dq, dk, dv;
};
void run(const Attention& op);
void run(const AttentionBackward& op);

bool attention_takes_wgmma();
void set_attention_takes_wgmma(bool on);

}  // namespace lightmoe
