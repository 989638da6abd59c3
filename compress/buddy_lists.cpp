#include "compress/buddy_lists.h"

#include <algorithm>
#include <numeric>

#include "loaders/json.h"

namespace lightmoe {
namespace {

std::vector<int32_t> by_falling(const double* values, int64_t count) {
  std::vector<int32_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [values](int32_t a, int32_t b) { return values[a] > values[b]; });
  return order;
}

std::vector<uint8_t> resident_slots(const ResidentSet& set, const LayerStatistics& layer, size_t l) {
  std::vector<uint8_t> resident(layer.count.size(), 0);
  if (!set.declared.empty()) {
    for (const int32_t slot : set.declared[l]) resident[static_cast<size_t>(slot)] = 1;
    return resident;
  }
  const std::vector<int32_t> order = by_falling(layer.count.data(), std::ssize(layer.count));
  for (int64_t i = 0; i < set.most_used; ++i) resident[static_cast<size_t>(order[static_cast<size_t>(i)])] = 1;
  return resident;
}

}  // namespace

std::vector<double> coactivations(const Statistics& s, int64_t layer, int64_t top_k,
                                  const std::vector<uint8_t>& removed) {
  const auto n = static_cast<size_t>(s.num_slots), k = static_cast<size_t>(top_k);
  std::vector<double> together(n * n, 0.0), logits(n);
  for (int64_t t = 0; t < s.sample_size(); ++t) {
    const float* row = s.layers[static_cast<size_t>(layer)].sample_logits.data() + t * s.num_slots;
    for (size_t e = 0; e < n; ++e) {
      const bool masked = !removed.empty() && removed[e] != 0;
      logits[e] = masked ? -std::numeric_limits<double>::infinity() : static_cast<double>(row[e]);
    }
    const std::vector<int32_t> order = by_falling(logits.data(), s.num_slots);
    for (size_t a = 0; a < k; ++a) {
      for (size_t b = 0; b < k; ++b) together[static_cast<size_t>(order[a]) * n + static_cast<size_t>(order[b])] += 1;
    }
  }
  return together;
}

std::vector<std::vector<int32_t>> buddy_lists(const std::vector<double>& together, int64_t num_slots, double tau) {
  check(tau > 0 && tau <= 1, ErrorKind::kUsage, "--buddy-tau {:g}: expected more than 0 and at most 1", tau);
  std::vector<std::vector<int32_t>> lists;
  for (int64_t i = 0; i < num_slots; ++i) {
    std::vector<double> row(together.begin() + i * num_slots, together.begin() + (i + 1) * num_slots);
    row[static_cast<size_t>(i)] = 0;
    const double all = std::accumulate(row.begin(), row.end(), 0.0);
    double covered = 0;
    std::vector<int32_t>& list = lists.emplace_back();
    for (const int32_t j : by_falling(row.data(), num_slots)) {
      if (row[static_cast<size_t>(j)] == 0 || covered >= tau * all) break;
      list.push_back(j);
      covered += row[static_cast<size_t>(j)];
    }
  }
  return lists;
}

ResidentSet read_resident_set(const std::filesystem::path& file, int64_t num_layers, int64_t num_slots) {
  const Json json = read_json_file(file.string());
  check(json.is_array() && static_cast<int64_t>(json.size()) == num_layers, ErrorKind::kInput,
        "{}: expected a list of {} lists of slots, one a layer", file.string(), num_layers);
  ResidentSet set;
  for (size_t l = 0; l < json.size(); ++l) {
    check(json[l].is_array() && !json[l].empty(), ErrorKind::kInput,
          "{}: layer {}: expected a list of at least one slot", file.string(), l);
    std::vector<int32_t>& slots = set.declared.emplace_back();
    for (const Json& slot : json[l]) {
      const bool in_range = slot.is_number_unsigned() && slot.get<uint64_t>() < static_cast<uint64_t>(num_slots);
      check(in_range, ErrorKind::kInput, "{}: layer {} holds {}, expected slots 0 to {}", file.string(), l, slot.dump(),
            num_slots - 1);
      slots.push_back(slot.get<int32_t>());
    }
  }
  return set;
}

std::vector<BuddyLayer> buddy_layers(const Statistics& s, const Olmoe& model, const ResidentSet& set, double tau) {
  const OlmoeConfig& c = model.config;
  check(s.num_layers == c.num_layers && s.num_slots == c.num_experts, ErrorKind::kInput,
        "buddies: statistics of {} layers, {} experts; the model has {}, {}", s.num_layers, s.num_slots, c.num_layers,
        c.num_experts);
  check(s.sample_size() > 0, ErrorKind::kInput,
        "buddies: the statistics have no token sample; calibrate with --sample-tokens above 0");
  check(!set.declared.empty() || (set.most_used >= 1 && set.most_used <= c.num_experts), ErrorKind::kUsage,
        "--resident {}: expected 1 to {} experts of a layer", set.most_used, c.num_experts);
  std::vector<BuddyLayer> layers;
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    const MoeLayer& moe = model.blocks[l].moe;
    check(owns_its_experts(moe), ErrorKind::kInput,
          "buddies: layer {} has slots that share an expert or hold none; residency is of slots with one of their own",
          l);
    std::vector<uint8_t> removed;
    for (const Slot& slot : moe.slots) removed.push_back(slot.kind == SlotKind::kRemoved);
    const std::vector<double> together = coactivations(s, static_cast<int64_t>(l), c.num_experts_per_token, removed);
    layers.push_back(
        {.resident = resident_slots(set, s.layers[l], l), .buddies = buddy_lists(together, s.num_slots, tau)});
  }
  return layers;
}

}  // namespace lightmoe
