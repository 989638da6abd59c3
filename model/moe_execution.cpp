#include <algorithm>
#include <map>
#include <set>

#include "model/moe_op.h"

namespace lightmoe {
namespace {

MoeExecution& execution() {
  static MoeExecution value;
  return value;
}

double mean(const std::vector<int64_t>& tokens_with) {
  double sum = 0, tokens = 0;
  for (size_t i = 0; i < tokens_with.size(); ++i) {
    sum += static_cast<double>(i) * static_cast<double>(tokens_with[i]);
    tokens += static_cast<double>(tokens_with[i]);
  }
  return tokens > 0 ? sum / tokens : 0;
}

}  // namespace

MoeExecution moe_execution() { return execution(); }
void set_moe_execution(MoeExecution value) { execution() = value; }

double ReplacedHistogram::mean_replaced() const { return mean(replaced); }
double ReplacedHistogram::mean_distinct_bases() const { return mean(distinct_bases); }

void ReplacedHistogram::add(const ReplacedHistogram& other) {
  const auto add_to = [](std::vector<int64_t>& sum, const std::vector<int64_t>& more) {
    sum.resize(std::max(sum.size(), more.size()), 0);
    for (size_t i = 0; i < more.size(); ++i) sum[i] += more[i];
  };
  add_to(replaced, other.replaced);
  add_to(distinct_bases, other.distinct_bases);
}

ReplacedHistogram replaced_histogram(const MoeLayer& layer, const Tensor& slots) {
  std::map<int32_t, int> pointers;
  for (const Slot& slot : layer.slots) {
    if (slot.kind == SlotKind::kExpert) ++pointers[slot.expert];
  }
  const Tensor host = slots.on(DeviceKind::kCpu);
  const int64_t tokens = host.dim(0), top_k = host.dim(1);
  ReplacedHistogram histogram{std::vector<int64_t>(static_cast<size_t>(top_k) + 1, 0),
                              std::vector<int64_t>(static_cast<size_t>(top_k) + 1, 0)};
  for (int64_t t = 0; t < tokens; ++t) {
    size_t replaced = 0;
    std::set<int32_t> bases;
    for (int64_t k = 0; k < top_k; ++k) {
      const Slot& slot = layer.slots[static_cast<size_t>(host.data<int32_t>()[t * top_k + k])];
      if (slot.kind != SlotKind::kExpert || pointers[slot.expert] < 2) continue;
      ++replaced;
      bases.insert(slot.expert);
    }
    ++histogram.replaced[replaced];
    ++histogram.distinct_bases[bases.size()];
  }
  return histogram;
}

}  // namespace lightmoe
