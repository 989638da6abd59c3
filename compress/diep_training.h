#pragma once
// The learned part of DiEP (arXiv 2509.16105): importance of every expert and layer by gradient descent, weights frozen.
//   relaxed layer l: y = beta_l sum over ALL experts of softmax(alpha_l)_i f_i(x), in place of the router's choice (eq. 5)
//   loss = cross-entropy of the sample's labels + lambda || H' - H ||_F / || H ||_F
//          H, H' final hidden states of the model and of the relaxed one
//   three steps of Adam on alpha, one on beta, and so on; cosine learning rate
// cost: E / K times the experts of a forward and backward pass for each of 10 epochs over the sample.

#include <cstdint>
#include <vector>

#include "compress/statistics.h"
#include "model/olmoe.h"

namespace lightmoe {

struct DiepOptions {
  int64_t epochs = 10, batch = 16;  // sequences of the token sample
  double lr = 5e-3, lambda = 0.01;
  int64_t alpha_steps = 3;  // for one of beta
  uint64_t seed = 1;        // of the order of the sequences
};

struct ExpertImportance {
  std::vector<std::vector<double>> alpha;  // [L][E], softmax taken
  std::vector<double> beta;                // [L]
  double first_loss = 0, last_loss = 0;    // of the first and last step
};
// Adds nothing to the model's own gradients. Error(kNumeric) when the loss is not finite.
ExpertImportance learn_importance(const Olmoe& model, const Statistics& sample, const DiepOptions& options);

// The loss of one batch of sequences and its gradient, for the training and its test. alpha [L][E] before the softmax.
struct ImportanceGradient {
  double loss = 0;
  std::vector<std::vector<double>> alpha;
  std::vector<double> beta;
};
ImportanceGradient importance_gradient(const Olmoe& model, const Batch& batch, double lambda,
                                       const std::vector<std::vector<double>>& alpha, const std::vector<double>& beta);

}  // namespace lightmoe
