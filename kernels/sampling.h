#pragma once
// SampleTokens: one token for every row of logits, on the device that holds them.
//   greedy (temperature 0)   argmax, the lowest id wins ties
//   else                     softmax(logits / temperature) over the kept ids, drawn by the inverse of its distribution function
// Kept ids, in this order (as Hugging Face's TopK and TopP warpers): the top_k largest logits (ties to the lower id; 0 = all), then the
// shortest prefix in order of logit whose weight, renormalised after top-k, reaches top_p (the id that crosses is kept).
// Weights are integers, floor(2^40 exp((logit - largest) (1 / temperature))), exp in f64: sums do not depend on their order, so every device
// keeps the same ids and draws the same token (a GPU's exp may differ in its last bit, which moves a weight by 2^-40 at most).
// Row n's draw is Philox(seed, streams[n])'s 64-bit value number draws[n], u: the id at floor(u total / 2^64) in order of ids; then
// draws[n] += 1. Greedy draws nothing. -inf never wins; a row that holds NaN or +inf, or -inf alone, gives token -1.
// shapes: logits f32 [N,V], ids [0, allowed) are looked at; streams, draws, tokens i32 [N]. Deterministic.
//
// AdvanceSequences: what the next decoding step reads, from the tokens of this one: ids = tokens; positions, k_count, cache_rows += 1;
// i32 [N] each.

#include <cstdint>
#include <span>

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct SamplingRule {
  double temperature = 0;
  int64_t top_k = 0;
  double top_p = 1;
  uint64_t seed = 1;
};
struct SampleTokens {
  Tensor logits;
  int64_t allowed = 0;
  SamplingRule rule;
  Tensor streams, draws, tokens;
};
struct AdvanceSequences {
  Tensor tokens;
  Tensor ids, positions, k_count, cache_rows;
};
void run(const SampleTokens& op);
void run(const AdvanceSequences& op);

// One row on the host; random: the draw u (greedy ignores it). -1 as above.
int32_t sample_row(std::span<const float> logits, const SamplingRule& rule, uint64_t random);

// The weight that top_p asks for, out of the total.
constexpr double kSamplingUnit = 0x1p40;
constexpr uint64_t mass_of(double top_p, uint64_t total) {
  const double wanted = top_p * static_cast<double>(total);
  const auto whole = static_cast<uint64_t>(wanted);
  const uint64_t up = whole + (static_cast<double>(whole) < wanted ? 1 : 0);
  return up < 1 ? 1 : up > total ? total : up;
}

}  // namespace lightmoe
