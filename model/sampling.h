#pragma once
// One token from one row of logits on the host, by the rule of kernels/sampling.h, with errors that say what is wrong:
// NaN, +inf or a row of -inf is Error(kNumeric). A draw takes exactly one 64-bit value of rng; greedy takes none.
// Sequence i draws from Philox(seed, i): its tokens do not depend on its neighbours in the batch.

#include <cstdint>
#include <span>

#include "kernels/sampling.h"
#include "runtime/philox.h"

namespace lightmoe {

using SamplingOptions = SamplingRule;
// Error(kUsage) naming the flag and its range: temperature >= 0, top_k >= 0, 0 < top_p <= 1.
void check_sampling(const SamplingOptions& options);

int32_t argmax(std::span<const float> logits);
int32_t sample(std::span<const float> logits, const SamplingOptions& options, Philox& rng);

}  // namespace lightmoe
