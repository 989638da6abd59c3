// EAN, expert activation norm (the score family of arXiv 2606.15716; ean_sum in the code of REAP, CerebrasResearch/reap):
// S_j = sum of ||f_j(x)|| over the tokens routed to j.  Published: the score. Changed: nothing.

#include "compress/pruning.h"

namespace lightmoe {
namespace {

const RegisterMethod method{prune_by_score<ScoreExponents{.mean = 0, .gate = 0, .norm = 1}>(
    "ean", "prune by the summed norm of the experts' outputs", "2606.15716")};

}  // namespace
}  // namespace lightmoe
