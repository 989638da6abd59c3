#pragma once
// Fits one kind of matrix of all experts of a layer to shared, mixed projections (struct Latent in model/moe.h), by weights alone:
//   min over A, B, z of  sum_i || W^i / sigma - A^i silu(sum_j w_ij B_j) ||^2 / (E F D),   w_i = softmax(z_i),  sigma = std of all W
// AdamW, all experts in every step (MoBE, arXiv 2508.05257; SLBF). A is scaled by sigma at the end. What the first values are and
// how large things get is the method's to say (compress/mobe.cpp, compress/slbf.cpp); the projections and their gradients are those of
// the model (model/latent_projections.h).
// shapes: W [E*F,D] f32, experts one below the other; A likewise [E*F,M]; B_j [M,D], of rank K rows [K,D] and left [M-K,K]; z [E,n].
// cost: a step is 6 E F M D + 6 E n M D FLOPs and, of rank K, 6 n (M-K) K D; memory 4 floats per number fitted, W twice.
// Deterministic, on the CPU.

#include <memory>
#include <vector>

#include "autograd/parameter.h"
#include "model/moe.h"

namespace lightmoe {

struct LatentFitSizes {
  int64_t latents = 0, width = 0, hidden = 0;  // E, F, D
  int64_t size = 0, bases = 0, rank = 0;       // M, n, K (0: full)
};

struct LatentFitOptions {
  int64_t steps = 1000;
  double lr = 0.07, last_lr = 0;  // cosine from one to the other
  double basis_lr_scale = 1;      // times lr, for B
  double weight_decay = 0;
};

class LatentFit {
 public:
  explicit LatentFit(const LatentFitSizes& sizes);  // all zero
  // To be given first values, and to be read after the fit.
  const Tensor& a() const { return a_->value; }
  const Tensor& basis(int64_t j) const { return layer_.projections[static_cast<size_t>(j)].down->value; }
  const Tensor& left(int64_t j) const { return layer_.projections[static_cast<size_t>(j)].left_down->value; }
  const Tensor& logits() const { return logits_->value; }
  Tensor mix() const;  // softmax of the logits, row by row

  // Relative squared error || W - A P ||^2 / || W ||^2 before and after. The values that were best of every twentieth of the steps stay.
  struct Errors {
    double before = 0, after = 0;
  };
  Errors fit(const Tensor& w, const LatentFitOptions& options);

 private:
  double residual(const Tensor& w, const Tensor& r);  // r = A P - w; its sum of squares
  void gradients(const Tensor& r);
  void add_logit_gradient();
  std::vector<ParameterPtr> parameters() const;

  LatentFitSizes sizes_;
  MoeLayer layer_;  // latents of which the down matrix alone is there
  ParameterPtr a_, logits_;
  Tensor offsets_;  // rows of A by expert
};

}  // namespace lightmoe
