#pragma once
// How much an expert is worth, from the sums of one calibration pass. One family (arXiv 2606.15716) holds the published scores:
//   S_j(b, a, c) = (1 / n_j^b) sum over the n_j tokens routed to j of g_j^a ||f_j||^c
//   frequency (0,0,0)  SEER soft (0,1,0)  EAN (0,0,1)  REAP (1,1,1)  MAN (1,0,1)  MSAN (1,0,2)
// g is the model's own gate, not renormalised for OLMoE. An expert without tokens scores 0.

#include <vector>

#include "compress/statistics.h"

namespace lightmoe {

struct ScoreExponents {
  int mean, gate, norm;  // b in {0,1}, a in {0,1}, c in {0,1,2}
};
std::vector<double> expert_scores(const LayerStatistics& layer, const ScoreExponents& exponents);  // [E]

}  // namespace lightmoe
