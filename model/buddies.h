#pragma once
// Which experts answer while only some of each layer's are resident (BuddyMoE, arXiv 2511.10054). For one token, choices in the order of
// their gates: a resident expert runs; a missing one
//   is answered for by the first expert of its buddy list that is resident and that the token neither chose nor took already, with
//   the missing one's gate, as long as the token has had fewer than rho substitutions and its router allows one:
//     entropy of the chosen gates, as shares of their sum, over ln K >= min_entropy   (a token whose router is sure is left alone)
//     the missing choice's share of the gates <= max_share                            (so is a choice that carries the token)
//   is fetched and runs itself otherwise: the output is the original's where nothing is substituted.
// Published (a note, not the text): co-activation lists cut at tau = 0.95, rho = 3, no buddy twice, conditions on the router's
// confidence. Our reading: these two conditions, both off by default; rho counts per layer. What a batch as a whole misses, when experts
// are evicted and how long a fetch takes is not modelled: residency is a fixed set.

#include <cstdint>
#include <vector>

#include "runtime/tensor.h"

namespace lightmoe {

struct BuddyLayer {
  std::vector<uint8_t> resident;              // [E] 1 = in memory
  std::vector<std::vector<int32_t>> buddies;  // [E] who may answer for it, the best first
};
struct BuddyOptions {
  std::vector<BuddyLayer> layers;  // [L]; empty: every expert is resident
  int64_t max_substitutions = 3;   // rho, of a token in a layer
  double min_entropy = 0;          // 0 = any token
  double max_share = 1;            // 1 = any choice
};
struct ResidencyCounts {
  int64_t resident = 0, substituted = 0, fetched = 0;  // (token, choice) pairs of all layers and passes
};

// slots i32 [T,K], gates [T,K] f32 or f64, the largest first. Returns the slots that run, in a tensor of their own; slot number E (skipped)
// stays. Choices on the CPU.
Tensor substitute_missing(const BuddyOptions& options, int layer, const Tensor& slots, const Tensor& gates,
                          ResidencyCounts& counts);

}  // namespace lightmoe
