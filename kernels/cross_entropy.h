#pragma once
// LM head and cross-entropy fused, in chunks of rows: the [T,V] logits are never whole in memory.
//   logits = x W^T;  loss = scale * sum_{t: labels[t] != -100} (logsumexp(logits_t) - logits_t[labels[t]])
//   gradients (where defined): dx = scale * (softmax - onehot) W ('='; 0 for ignored rows);  dw += scale * (softmax - onehot)^T x.
// Labels are already aligned with the rows (the caller shifts by one, as Hugging Face ForCausalLMLoss does inside).
// scale is usually 1 / (unmasked tokens of the whole optimizer step), so that gradient accumulation is exact.
//
// LabelScores, for evaluation: per row log p(label), log-sum-exp, whether the label is the argmax (lowest id wins ties), and argmax.
// shapes: x, dx [T,D]; w, dw [V,D]; labels i32 [T] in [0,V) or -100; loss f64 [1] '='; log_prob, lse f64 [T], argmax i32 [T] (0 for ignored).
// dtypes: x f32/bf16/f64, w of x's type or f32/bf16, dw of the gradient's type (f32, f64); logits and softmax f32 (f64).
// memory: chunk_rows * V values (0 = the op's default, about 64 MB), counted as scratch. Deterministic, and a row's scores do not
//   depend on T or chunk_rows with the `native` GEMM backend.
// On a GPU: the default chunk is 256 MB (in whole tiles of 128 rows, and half as much again for gradients with compute kBF16, where
//   they are kept as bf16 because the products round them so anyway); ignored rows are multiplied too, the host does not know which
//   they are; a label outside the vocabulary stops the kernel.

#include "kernels/gemm.h"
#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct LmHeadCrossEntropy {
  Tensor x, w, labels;
  double scale = 1;
  int64_t chunk_rows = 0;
  GemmCompute compute = GemmCompute::kF32;
  Tensor loss, dx, dw;  // dx, dw may be undefined
};
struct LabelScores {
  Tensor x, w, labels;
  int64_t chunk_rows = 0;
  GemmCompute compute = GemmCompute::kF32;
  Tensor log_prob, lse, argmax;  // each may be undefined
};
void run(const LmHeadCrossEntropy& op);
void run(const LabelScores& op);

}  // namespace lightmoe
