#pragma once
// Buddy lists and resident sets for model/buddies.h, from a calibration's token sample.
//   together[i,j] = sampled tokens whose K largest router logits hold both i and j
//   buddies of i: the others in falling order of together[i,.] (ties: the lower slot; never together: not a buddy), cut at the shortest
//   prefix that holds tau of the row's sum                                                        (BuddyMoE, arXiv 2511.10054: tau = 0.95)

#include <filesystem>
#include <vector>

#include "compress/statistics.h"
#include "model/olmoe.h"

namespace lightmoe {

// [E*E]; the diagonal counts the tokens that chose i. Slots that `removed` marks (empty: none) are never chosen.
std::vector<double> coactivations(const Statistics& statistics, int64_t layer, int64_t top_k,
                                  const std::vector<uint8_t>& removed = {});
// Of a matrix as above. Error(kUsage) unless 0 < tau <= 1.
std::vector<std::vector<int32_t>> buddy_lists(const std::vector<double>& together, int64_t num_slots, double tau);

struct ResidentSet {
  int64_t most_used = 0;  // that many of each layer, by the tokens that chose them (ties: the lower slot)
  std::vector<std::vector<int32_t>> declared;  // [L] slots; if not empty, instead
};
// A JSON file [[slot, ..], ..], one list a layer. Error(kInput) with file, layer and value.
ResidentSet read_resident_set(const std::filesystem::path& file, int64_t num_layers, int64_t num_slots);
// Error(kInput): the statistics do not fit the model, or slots of it share experts or hold something else than experts. Error(kUsage): sizes.
std::vector<BuddyLayer> buddy_layers(const Statistics& statistics, const Olmoe& model, const ResidentSet& set,
                                     double tau);

}  // namespace lightmoe
