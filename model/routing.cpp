#include "model/routing.h"

#include "runtime/dispatch.h"

namespace lightmoe {
namespace {

struct Rule {
  double threshold = 0;
  const double* factor = nullptr;  // [E*E]
  int64_t num_slots = 0;
  bool skips(int32_t first, int32_t slot, double largest, double gate) const {
    const double scale = factor == nullptr ? 1 : factor[first * num_slots + slot];
    return gate < threshold * scale * largest;
  }
};

template <class T>
int64_t skip(const Rule& rule, bool renormalize, const Tensor& slots, const Tensor& gates) {
  const int64_t tokens = slots.dim(0), top_k = slots.dim(1);
  int64_t skipped = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    int32_t* slot = slots.data<int32_t>() + t * top_k;
    T* gate = gates.data<T>() + t * top_k;
    const auto largest = static_cast<double>(gate[0]);
    double left = largest;
    for (int64_t k = 1; k < top_k; ++k) {
      if (rule.skips(slot[0], slot[k], largest, static_cast<double>(gate[k]))) {
        slot[k] = static_cast<int32_t>(rule.num_slots);
        gate[k] = 0;
        ++skipped;
      }
      left += static_cast<double>(gate[k]);
    }
    for (int64_t k = 0; renormalize && k < top_k; ++k) gate[k] = static_cast<T>(static_cast<double>(gate[k]) / left);
  }
  return skipped;
}

}  // namespace

int64_t experts_per_token(const RoutingOptions* options, int64_t model_top_k) {
  if (options == nullptr || options->top_k == 0) return model_top_k;
  check(options->top_k >= 1 && options->top_k <= model_top_k, ErrorKind::kUsage,
        "{} experts per token: expected 1 to {} (num_experts_per_tok)", options->top_k, model_top_k);
  return options->top_k;
}

void count_blocks(const RoutingOptions& options, const Tensor& slots, int64_t num_slots, int64_t run, int64_t all) {
  if (options.counts == nullptr) return;
  int64_t choices = 0;
  const Tensor chosen = slots.on(DeviceKind::kCpu);
  for (int64_t i = 0; i < chosen.numel(); ++i) choices += chosen.data<int32_t>()[i] < num_slots ? 1 : 0;
  options.counts->blocks += choices * all;
  options.counts->blocks_run += choices * run;
}

RoutedTokens apply_routing(const RoutingOptions& options, int layer, int64_t num_slots, bool renormalize,
                           const RoutedTokens& routed) {
  const DeviceKind device = routed.slots.device();
  const bool changes = !options.skip_threshold.empty() || !options.buddies.layers.empty();
  const auto at = [](DeviceKind place, const RoutedTokens& t) {
    return RoutedTokens{t.slots.on(place), t.gates.on(place)};
  };
  RoutedTokens left =
      apply_skipping(options, layer, num_slots, renormalize, changes ? at(DeviceKind::kCpu, routed) : routed);
  if (!options.buddies.layers.empty()) {
    ResidencyCounts counts;
    left.slots = substitute_missing(options.buddies, layer, left.slots, left.gates,
                                    options.counts != nullptr ? options.counts->residency : counts);
  }
  return at(device, left);
}

RoutedTokens apply_skipping(const RoutingOptions& options, int layer, int64_t num_slots, bool renormalize,
                            const RoutedTokens& routed) {
  if (options.counts != nullptr) options.counts->chosen += routed.slots.numel();
  if (options.skip_threshold.empty()) return routed;
  require(routed.slots.device() == DeviceKind::kCpu, "skipping: the choices are on {}", name_of(routed.slots.device()));
  const auto l = static_cast<size_t>(layer);
  require(l < options.skip_threshold.size(), "skipping: {} thresholds, layer {}", options.skip_threshold.size(), layer);
  const Rule rule{.threshold = options.skip_threshold[l],
                  .factor = options.skip_factor.empty() ? nullptr : options.skip_factor[l].data(),
                  .num_slots = num_slots};
  const RoutedTokens left{routed.slots.clone(), routed.gates.clone()};
  const int64_t skipped = left.gates.dtype() == DType::kF64 ? skip<double>(rule, renormalize, left.slots, left.gates)
                                                            : skip<float>(rule, renormalize, left.slots, left.gates);
  if (options.counts != nullptr) options.counts->skipped += skipped;
  return left;
}

}  // namespace lightmoe
