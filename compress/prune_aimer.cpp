// AIMER (arXiv 2603.18492; code ZongfangLiu/AIMER): no calibration. Per expert, over all its N weights,
//   score = mean |w| / root mean square w = ||w||_1 / (sqrt(N) ||w||_2),  between 1/sqrt(N) (one weight) and 1 (all equal)
// and the experts of the HIGHEST score go, the same number per layer (its README: higher scores are more removable): few large
// weights mark a specialised expert.
// Published: score, direction, uniform counts. Our reading: gate, up and down together as one vector. Changed: nothing.

#include <cmath>

#include "compress/pruning.h"
#include "compress/weights.h"

namespace lightmoe {
namespace {

double score_of(const ExpertSource& experts, int64_t layer, int64_t expert) {
  double sum = 0, squares = 0, count = 0;
  for (const ExpertMatrix matrix : kExpertMatrices) {
    const Tensor w = experts.place(layer, expert, matrix).read(DType::kF32);
    const float* values = w.data<float>();
    for (int64_t i = 0; i < w.numel(); ++i) {
      const auto v = static_cast<double>(values[i]);
      sum += std::abs(v), squares += v * v;
    }
    count += static_cast<double>(w.numel());
  }
  return squares > 0 ? sum / std::sqrt(count * squares) : 1;
}

Plan plan(const MethodInput& input) {
  return plan_pruning(input, [&](int64_t layer) {
    std::vector<double> worth(static_cast<size_t>(input.config.num_experts), 0.0);
    if (input.experts == nullptr) return worth;  // arithmetic only: the sizes are right
    for (size_t e = 0; e < worth.size(); ++e) worth[e] = -score_of(*input.experts, layer, static_cast<int64_t>(e));
    return worth;
  });
}

const RegisterMethod method{{.name = "aimer",
                             .summary = "prune by the weights alone: mean |w| over their root mean square",
                             .paper = "2603.18492",
                             .slots = "removed",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kNothing,
                             .train_free = true,
                             .compresses = true,
                             .redirects = true}};

}  // namespace
}  // namespace lightmoe
