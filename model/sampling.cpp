#include "model/sampling.h"

#include <cmath>

#include "runtime/error.h"

namespace lightmoe {

void check_sampling(const SamplingOptions& options) {
  check(std::isfinite(options.temperature) && options.temperature >= 0, ErrorKind::kUsage,
        "--temperature {}: expected 0 (greedy) or more", options.temperature);
  check(options.top_k >= 0, ErrorKind::kUsage, "--top-k {}: expected 0 (all) or more", options.top_k);
  check(options.top_p > 0 && options.top_p <= 1, ErrorKind::kUsage, "--top-p {}: expected more than 0, at most 1",
        options.top_p);
}

int32_t argmax(std::span<const float> logits) {
  for (size_t i = 0; i < logits.size(); ++i) {
    check(!std::isnan(logits[i]) && logits[i] < INFINITY, ErrorKind::kNumeric, "logit of id {} is {}", i, logits[i]);
  }
  const int32_t best = sample_row(logits, {}, 0);
  check(best >= 0, ErrorKind::kNumeric, "no finite logit among {}", logits.size());
  return best;
}

int32_t sample(std::span<const float> logits, const SamplingOptions& options, Philox& rng) {
  const int32_t best = argmax(logits);
  return options.temperature == 0 ? best : sample_row(logits, options, rng.next_u64());
}

}  // namespace lightmoe
