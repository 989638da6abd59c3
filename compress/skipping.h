#pragma once
// Thresholds for skipping experts at run time (model/routing.h), from a calibration's token sample.
//   NAEE (arXiv 2402.14800)   threshold[l] = median over tokens of g_1 / g_0, the ratio of the second gate to the first (K = 2)
//   DiEP (arXiv 2509.16105)   the same, times  cka(f_i, f_j) / mean cka of the layer  for choices i = first and j
// Our reading for K > 2: the median runs over all lower choices of all tokens, so that about half of them are skipped on the sample, as
// with K = 2; another quantile skips more or less. cka is linear centred kernel alignment of the slots' outputs on the sample's inputs
// (at most kCkaTokens of them), whoever the tokens chose. Slots that the model masks take no part.

#include "compress/statistics.h"
#include "model/olmoe.h"

namespace lightmoe {

inline constexpr int64_t kCkaTokens = 256;

// [L]. Error(kInput) when the statistics do not fit the model or have no token sample; Error(kUsage) unless 0 <= quantile <= 1.
std::vector<double> skip_thresholds(const Statistics& statistics, const Olmoe& model, double quantile);
// [L] of [E*E]. Needs the sample's inputs (`calibrate --sample-inputs`).
std::vector<std::vector<double>> skip_factors(const Statistics& statistics, const Olmoe& model);

}  // namespace lightmoe
