#pragma once
// Olmoe::forward_backward with another root than cross-entropy.

#include <functional>

#include "autograd/tape.h"
#include "model/olmoe.h"

namespace lightmoe {

// Given the final states [T,D], puts its gradient into them and returns what gives the sum of cross-entropies over the labels, once
// backward is queued.
using LossRoot = std::function<std::function<double()>(Tape& tape, const Var& states)>;
TrainLosses forward_backward_with(Olmoe& model, const Batch& batch, const TrainOptions& options, const LossRoot& root);

}  // namespace lightmoe
