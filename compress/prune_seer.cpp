// SEER-MoE (arXiv 2404.05089), the soft count: S_j = sum of the gates of j over the tokens that chose it; this is also the
// importance that LightMoE replaces by.
// Published: the score, and fine-tuning with an entropy penalty on the gates so that fewer experts can be chosen. Our reading: gates as
// the model gives them; the entropy is that of the softmax over all slots, mean over tokens and layers. Changed: recovery is the common one
// (LoRA); the penalty is an option of recovery after any method (`--entropy-coef`), the smaller K one of running (`--experts-per-token`).

#include "compress/pruning.h"

namespace lightmoe {
namespace {

const RegisterMethod method{prune_by_score<ScoreExponents{.mean = 0, .gate = 1, .norm = 0}>(
    "seer", "prune the experts of the least gate mass (soft count)", "2404.05089")};

}  // namespace
}  // namespace lightmoe
