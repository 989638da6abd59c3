#pragma once
// Training in which an expert's gradient is made orthogonal to the other experts of its layer on every n-th step (OMoE, arXiv
// 2310.09762: normal and orthogonal steps alternate, so that experts grow apart). For each of gate-up and down, with W_j the other
// experts' matrices as vectors:
//   g_i <- g_i - sum_{j != i} c_j W_j,  c from (W W^T) c = W g_i:   <g_i, W_j> = 0 for all j != i
// Ours: the subspace is that of the weights as they are (published: a projector accumulated over training from the experts' parameters),
// and it is the gradient that is projected: AdamW's element-wise scaling comes after it.
// Projecting is linear and idempotent, so each micro-batch's gradient may be projected as it comes.
// cost: E^2 products of vectors per layer, E solves of E - 1 unknowns.

#include "model/trainer.h"

namespace lightmoe {

// Of all layers; experts that are frozen or without a gradient are left alone.
void project_expert_gradients(Olmoe& model);

class OrthogonalOlmoe : public TrainableOlmoe {
 public:
  // every = 1: each step; 2: each second one; ... Error(kUsage) below 1.
  OrthogonalOlmoe(Olmoe& model, int64_t every);
  void before_step(int64_t step) { projects_ = step % every_ == 0; }
  TrainLosses forward_backward(const Batch& batch, const TrainOptions& options) override;

 private:
  Olmoe& model_;
  int64_t every_;
  bool projects_ = false;
};

}  // namespace lightmoe
