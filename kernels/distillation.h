#pragma once
// LM head and the loss towards another model's output, in chunks of rows: neither model's [T,V] logits are ever whole in memory.
//   z = x W^T, t = teacher Wt^T;  over labelled rows, with T the temperature and q = softmax(t / T), p_T = softmax(z / T):
//   losses = { sum of logsumexp(z) - z[label],  sum of KL(q || p_T) }                                                         ('=', not scaled)
//   dx (where defined) = scale * ((1 - weight) (softmax(z) - onehot) + weight T (p_T - q)) W                      ('='; 0 for ignored rows)
// which is the gradient of scale * ((1 - weight) CE + weight T^2 KL); T^2 keeps its size (Hinton et al., arXiv 1503.02531). The heads are
// frozen: no gradient of theirs.
// shapes: x, teacher, dx [T,D] (the teacher's D may differ); w [V,D], teacher_w [V,D of the teacher]; labels i32 [T] in [0,V) or -100, aligned
//   with the rows; losses f64 [2].
// dtypes: x f32/bf16/f64 (f64: cpu), teacher of x's type, w and teacher_w of it or f32/bf16; logits and softmax f32 (f64), sums f64.
// memory: twice chunk_rows * V values (0 = the op's default, about 64 MB together; 256 MB on a GPU), counted as scratch. Deterministic.
// On a GPU ignored rows are multiplied too, and a label outside the vocabulary stops the kernel (as in kernels/cross_entropy.h).

#include "kernels/gemm.h"
#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct LmHeadDistillation {
  Tensor x, w, teacher, teacher_w, labels;
  double weight = 0.5, temperature = 1, scale = 1;
  int64_t chunk_rows = 0;
  GemmCompute compute = GemmCompute::kF32;
  Tensor losses, dx;  // dx may be undefined
};
void run(const LmHeadDistillation& op);

}  // namespace lightmoe
