#pragma once
// One token from one row of logits [V] (f32), all arithmetic in double:
//   greedy (temperature 0)   argmax, the lowest id wins ties
//   else                     softmax(logits / temperature) over the kept ids, drawn by the inverse of its distribution function
// Kept ids, in this order (as Hugging Face's TopK and TopP warpers): the top_k largest (ties to the lower id), then the shortest
// prefix by probability, renormalised after top-k, whose sum reaches top_p (the id that crosses is kept; at least one remains).
// -inf never wins. NaN, +inf or a row of -inf is Error(kNumeric). A draw takes exactly one uniform of rng; greedy takes none.

#include <cstdint>
#include <span>

#include "runtime/philox.h"

namespace lightmoe {

struct SamplingOptions {
  double temperature = 0;
  int64_t top_k = 0;  // 0 = all
  double top_p = 1;
  uint64_t seed = 1;  // sequence i draws from Philox(seed, i): its tokens do not depend on its neighbours in the batch
};
// Error(kUsage) naming the flag and its range: temperature >= 0, top_k >= 0, 0 < top_p <= 1.
void check_sampling(const SamplingOptions& options);

int32_t argmax(std::span<const float> logits);
int32_t sample(std::span<const float> logits, const SamplingOptions& options, Philox& rng);

}  // namespace lightmoe
