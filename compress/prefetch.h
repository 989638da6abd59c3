#pragma once
// Which experts a token will need, known before its layer runs: the systems part of Read-ME (arXiv 2410.19123; published: one causal
// router of its own picks the expert index of every layer in advance). A prediction is a hint to fetch experts; the router still
// decides, so the output is the original's whatever is predicted. Two predictors of layer l from what layer l - ahead saw, x:
//   router   layer l's own router on x: hidden states change little from layer to layer; nothing is trained
//   linear   logits = W x + b, W and b by ridge regression on layer l's router logits (closed form), from the first part of the data
// Hit rate: of the K experts that a token's router chose, the share among the n predicted ones. Ours, published figures are of another
// model; caches and the time a fetch takes are not simulated.

#include <cstdint>
#include <string>
#include <vector>

#include "model/olmoe.h"

namespace lightmoe {

struct PrefetchOptions {
  int64_t ahead = 1;               // layers
  std::vector<int64_t> predicted;  // set sizes n; empty: K, 2K
  double ridge = 1e-3;             // of the mean diagonal of the inputs' second moments
  int64_t batch_rows = 16;
};
struct PrefetchLayer {
  int64_t layer = 0;
  std::vector<double> router_hits, linear_hits;  // per set size
};
struct PrefetchReport {
  std::vector<int64_t> predicted;
  std::vector<PrefetchLayer> layers;  // from layer `ahead` on
  int64_t train_tokens = 0, test_tokens = 0;
};
// Rows of token ids; the predictor is fitted on `train`, hits are counted on `test`.
PrefetchReport measure_prefetch(const Olmoe& model, const std::vector<std::vector<int32_t>>& train,
                                const std::vector<std::vector<int32_t>>& test, const PrefetchOptions& options);

// Hints as they would be given while the model runs: an observer that predicts for layer l + ahead when layer l's router has run.
// The n experts of largest logit of layer l + ahead, by that layer's router. `hint` may fetch them; it cannot change the output.
Observer prefetch_hints(const Olmoe& model, int64_t ahead, int64_t n,
                        std::function<void(int64_t layer, const std::vector<int32_t>& experts)> hint);

// The n largest of one row of scores (ties: the lower index), in falling order.
std::vector<int32_t> largest(const double* scores, int64_t count, int64_t n);

}  // namespace lightmoe
