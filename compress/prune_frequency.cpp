// Frequency pruning: S_j = number of tokens whose top K hold j. The oldest baseline (heavy hitters, hard count, of SEER-MoE,
// arXiv 2404.05089; "Frequency" in the tables of arXiv 2510.13999 and 2605.29350).
// Published: the score and removing per layer. Our reading: the same number per layer. Changed: nothing.

#include "compress/pruning.h"

namespace lightmoe {
namespace {

const RegisterMethod method{prune_by_score<ScoreExponents{.mean = 0, .gate = 0, .norm = 0}>(
    "frequency", "prune the experts that the fewest tokens choose", "2404.05089")};

}  // namespace
}  // namespace lightmoe
