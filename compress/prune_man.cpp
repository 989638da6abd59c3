// MAN, mean activation norm (the score family of arXiv 2606.15716): S_j = mean of ||f_j(x)|| over the tokens routed to j. The best of
// six scores for OLMoE in that paper's suite with generation (25 % removed).  Published: the score. Changed: nothing.

#include "compress/pruning.h"

namespace lightmoe {
namespace {

const RegisterMethod method{prune_by_score<ScoreExponents{.mean = 1, .gate = 0, .norm = 1}>(
    "man", "prune by the mean norm of the experts' outputs", "2606.15716")};

}  // namespace
}  // namespace lightmoe
