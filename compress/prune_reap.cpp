// REAP, router-weighted expert activation pruning (arXiv 2510.13999; code CerebrasResearch/reap): S_j = mean of g_j(x) ||f_j(x)||
// over the tokens routed to j; the lowest n per layer go, with their router rows.
// Published: the score, uniform counts, rows deleted. Our reading: gates not renormalised over the top K for OLMoE, as the model does;
// masking the logits before the softmax equals deleting the rows. Changed: "super experts" are not exempted.

#include "compress/pruning.h"

namespace lightmoe {
namespace {

const RegisterMethod method{prune_by_score<ScoreExponents{.mean = 1, .gate = 1, .norm = 1}>(
    "reap", "prune by the mean of gate times output norm", "2510.13999")};

}  // namespace
}  // namespace lightmoe
