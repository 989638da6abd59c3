#pragma once
// Small differentiable ops of what stands beside the experts (model/moe_extension.h), of kernels/contraction.h, activation.h, softmax_top.h,
// combine.h and masked_mean.h. f32, bf16 or f64. Blocks: a row [n*r] is n blocks of r.
//   parameter_value   the parameter as an activation, its gradient goes to the parameter
//   activate          kernels/activation.h, element by element
//   multiply          a * b, element by element, one shape
//   multiply_scalar   s x, s [1]
//   columns           x[:, begin : begin + count]
//   reshaped          same elements
//   softmax_top       y = softmax over a row's k largest of scale z, 0 elsewhere (ties: the lower column)
//   normalised_rows   x / its row's sum; rows that sum to 0 stay 0
//   scale_blocks      y[t, i r + j] = w[t,i] x[t, i r + j]                                    x [T,n*r]  w [T,n]
//   mix_blocks        y[t, p r + j] = sum_i w[t, p n + i] x[t, i r + j]                       x [T,n*r]  w [T,P*n]  y [T,P*r]
//   block_linear      y[t, i m + o] = sum_j x[t, i r + j] w[i m + o, j]                       x [T,n*r]  w [n*m,r]  y [T,n*m]
//   add_tiled         y[t, p n + j] = x[t,j] + c[p,j]                                         x [T,n]  c [P,n]  y [T,P*n]
//   mix_rows          y[t,:] = sum_k w[t,k] table[index[t,k],:]; index E adds nothing                        index i32 [T,K]  table [E,n]

#include "autograd/ops.h"
#include "kernels/activation.h"

namespace lightmoe {

Var parameter_value(Tape& tape, const ParameterPtr& p, DType dtype);
Var activate(Tape& tape, const Var& x, Activation kind);
Var multiply(Tape& tape, const Var& a, const Var& b);
Var multiply_scalar(Tape& tape, const Var& x, const Var& s);
Var columns(Tape& tape, const Var& x, int64_t begin, int64_t count);
Var reshaped(Tape& tape, const Var& x, const Shape& shape);
Var softmax_top(Tape& tape, const Var& z, int64_t k, double scale = 1);
Var normalised_rows(Tape& tape, const Var& x);
Var scale_blocks(Tape& tape, const Var& x, const Var& w);
Var mix_blocks(Tape& tape, const Var& x, const Var& w, int64_t blocks);
Var block_linear(Tape& tape, const Var& x, const ParameterPtr& w, int64_t blocks, GemmCompute compute);
Var add_tiled(Tape& tape, const Var& x, const Var& c);
Var mix_rows(Tape& tape, const Var& table, const Tensor& index, const Var& w);
// A root: mean over the tensors of the mean over their elements, gradient of `scale` times it. Row i of g [T*K,N] is of token i / K, whose
// mask u8 [T] (undefined: all) may leave it out.
Loss openness_loss(Tape& tape, const std::vector<Var>& g, const Tensor& mask, double scale);

}  // namespace lightmoe
