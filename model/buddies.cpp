#include "model/buddies.h"

#include <algorithm>
#include <cmath>

#include "runtime/dispatch.h"

namespace lightmoe {
namespace {

// One token's choices.
struct Token {
  const BuddyOptions& options;
  const BuddyLayer& layer;
  const int32_t* chosen;
  std::vector<double> share;  // of the sum of the gates
  int32_t* runs;
  size_t top_k() const { return share.size(); }

  bool is_skipped(size_t k) const { return chosen[k] >= static_cast<int32_t>(layer.resident.size()); }
  bool is_resident(size_t k) const { return layer.resident[static_cast<size_t>(chosen[k])] != 0; }
  bool is_unsure() const {
    double entropy = 0;
    for (const double p : share) entropy -= p > 0 ? p * std::log(p) : 0;
    return entropy >= options.min_entropy * std::log(static_cast<double>(top_k()));
  }
  bool runs_already(int32_t slot) const {  // the token's own choices stand in `runs` from the start
    const auto k = static_cast<std::ptrdiff_t>(top_k());
    return std::find(runs, runs + k, slot) != runs + k;
  }
  int32_t buddy_of(int32_t missing) const {  // -1: none
    for (const int32_t buddy : layer.buddies[static_cast<size_t>(missing)]) {
      if (layer.resident[static_cast<size_t>(buddy)] != 0 && !runs_already(buddy)) return buddy;
    }
    return -1;
  }
  void run(ResidencyCounts& counts) const;
};

void Token::run(ResidencyCounts& counts) const {
  const int64_t allowed = is_unsure() ? options.max_substitutions : 0;
  int64_t substituted = 0;
  for (size_t k = 0; k < top_k(); ++k) {
    if (is_skipped(k)) continue;
    if (is_resident(k)) {
      ++counts.resident;
      continue;
    }
    const bool may = substituted < allowed && share[k] <= options.max_share;
    const int32_t buddy = may ? buddy_of(chosen[k]) : -1;
    if (buddy < 0) {
      ++counts.fetched;
      continue;
    }
    runs[k] = buddy;
    ++substituted;
  }
  counts.substituted += substituted;
}

template <class T>
std::vector<double> shares(const T* gates, int64_t top_k) {
  std::vector<double> share(gates, gates + top_k);
  double sum = 0;
  for (const double g : share) sum += g;
  for (double& g : share) g = sum > 0 ? g / sum : 0;
  return share;
}

}  // namespace

Tensor substitute_missing(const BuddyOptions& options, int layer, const Tensor& slots, const Tensor& gates,
                          ResidencyCounts& counts) {
  require(slots.device() == DeviceKind::kCpu, "buddies: the choices are on {}", name_of(slots.device()));
  const auto l = static_cast<size_t>(layer);
  require(l < options.layers.size(), "buddies: {} layers, layer {}", options.layers.size(), layer);
  const Tensor runs = slots.clone();
  const int64_t top_k = slots.dim(1);
  for (int64_t t = 0; t < slots.dim(0); ++t) {
    const Token token{.options = options,
                      .layer = options.layers[l],
                      .chosen = slots.data<int32_t>() + t * top_k,
                      .share = gates.dtype() == DType::kF64 ? shares(gates.data<double>() + t * top_k, top_k)
                                                            : shares(gates.data<float>() + t * top_k, top_k),
                      .runs = runs.data<int32_t>() + t * top_k};
    token.run(counts);
  }
  return runs;
}

}  // namespace lightmoe
