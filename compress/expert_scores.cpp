#include "compress/expert_scores.h"

namespace lightmoe {

std::vector<double> expert_scores(const LayerStatistics& layer, const ScoreExponents& e) {
  const std::vector<double>* sums[2][3] = {{&layer.count, &layer.output_norm, &layer.output_norm2},
                                           {&layer.gate_mass, &layer.gate_output_norm, &layer.gate_output_norm2}};
  std::vector<double> scores = *sums[e.gate][e.norm];
  if (e.mean == 0) return scores;
  for (size_t i = 0; i < scores.size(); ++i) scores[i] = layer.count[i] > 0 ? scores[i] / layer.count[i] : 0;
  return scores;
}

}  // namespace lightmoe
