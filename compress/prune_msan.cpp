// MSAN, mean squared activation norm (the score family of arXiv 2606.15716): S_j = mean of ||f_j(x)||^2 over the tokens routed to j.
// Published: the score. Changed: nothing.

#include "compress/pruning.h"

namespace lightmoe {
namespace {

const RegisterMethod method{prune_by_score<ScoreExponents{.mean = 1, .gate = 0, .norm = 2}>(
    "msan", "prune by the mean squared norm of the experts' outputs", "2606.15716")};

}  // namespace
}  // namespace lightmoe
