#pragma once
// MoEfication (arXiv 2110.01786) of OLMoE's experts: the units of each expert are put in blocks of like ones, lying after each other, and a
// selector learns which blocks an input needs (model/extension_moefication.cpp runs them).
//   likeness   weights: cosine of [W_g row, W_u row];  activations: cosine of |a_j| over the sampled tokens that chose the expert
//              (units that fire together; published as a graph of co-activation that METIS cuts)
//   blocks     balanced k-means (compress/balanced_kmeans.h); rows of gate and up and columns of down are permuted: the same function
//   selectors  W2 tanh(W1 x), an expert at a time, on the sampled inputs that chose it: binary cross-entropy towards each block's
//              contribution over the largest of the token (model/unit_blocks.h); Adam 0.01, 30 epochs, as published
// Every fifth sampled token is held out of the selectors' training and tells how well they choose.

#include "compress/statistics.h"
#include "model/olmoe.h"

namespace lightmoe {

enum class UnitLikeness : uint8_t { kWeights, kActivations };
UnitLikeness parse_unit_likeness(std::string_view name);  // "weights", "activations"; Error(kUsage)

struct UnitSplitOptions {
  int64_t blocks = 8;
  UnitLikeness likeness = UnitLikeness::kActivations;
  bool selectors = true;
  int64_t epochs = 30;
  double lr = .01;
  int64_t rows = 64;  // tokens of a step
  uint64_t seed = 1;
};
struct UnitSplitReport {
  // Per layer, over held-out choices: share of the blocks' contributions that the better half of the blocks makes, when the selector
  // names that half, when the contributions themselves do, and half of everything (any half, on average).
  struct Layer {
    double selector = 0, oracle = 0;
    int64_t choices = 0;
  };
  std::vector<Layer> layers;
};
// Error(kUsage): blocks do not divide the width, slots without an expert of their own; Error(kInput): statistics that lack the inputs of
// the token sample (calibrate --sample-inputs). Statistics may be null for likeness of weights without selectors.
UnitSplitReport split_units(Olmoe& model, const Statistics* statistics, const UnitSplitOptions& options);

}  // namespace lightmoe
