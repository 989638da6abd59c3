#include "kernels/dispatch_plan.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "tests/cases/dispatch_plan.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

std::vector<int32_t> ints(const Tensor& tensor) {
  const Tensor t = tensor.on(DeviceKind::kCpu);
  return {t.data<int32_t>(), t.data<int32_t>() + t.numel()};
}

// The first `count` entries of a list; on devices that do not know how many there are, only -1 may follow.
std::vector<int32_t> first_ints(const Tensor& list, size_t count) {
  std::vector<int32_t> all = ints(list);
  EXPECT_TRUE(list.device() == DeviceKind::kCpu ? all.size() == count : all.size() >= count);
  for (size_t i = count; i < all.size(); ++i) EXPECT_EQ(all[i], -1) << "entry " << i << " behind " << count;
  all.resize(count);
  return all;
}

std::vector<int32_t> groups_of(const cases::DispatchCase& c) {
  std::vector<int32_t> group(static_cast<size_t>(c.slots));
  for (int64_t s = 0; s < c.slots; ++s)
    group[static_cast<size_t>(s)] = static_cast<int32_t>(s * 7 % (c.groups + 1) - 1);
  return group;
}

Tensor slots_of(const cases::DispatchCase& c) {
  Philox random(static_cast<uint64_t>(c.tokens));
  std::vector<int32_t> slots;
  for (int64_t t = 0; t < c.tokens; ++t) {
    std::vector<int32_t> all(static_cast<size_t>(c.slots));
    for (size_t s = 0; s < all.size(); ++s) all[s] = static_cast<int32_t>(s);
    for (size_t k = 0; k < static_cast<size_t>(c.top_k); ++k) {
      std::swap(all[k], all[k + random.below(all.size() - k)]);
      if (c.choice == cases::Choice::kOneSlot) all[k] = static_cast<int32_t>(c.slots - 1);
      if (c.choice == cases::Choice::kRepeated) all[k] = all[0];
      slots.push_back(all[k]);
    }
  }
  return Tensor::from(slots, {c.tokens, c.top_k});
}

std::vector<int32_t> offsets_of(const std::vector<int32_t>& sorted_keys, int32_t count) {
  std::vector<int32_t> offsets;
  for (int32_t key = 0; key <= count; ++key) {
    offsets.push_back(
        static_cast<int32_t>(std::lower_bound(sorted_keys.begin(), sorted_keys.end(), key) - sorted_keys.begin()));
  }
  return offsets;
}

// Everything by sorting tuples, as the header words it.
void check_case(const cases::DispatchCase& c) {
  SCOPED_TRACE(::testing::Message() << c.tokens << " tokens, " << c.slots << " slots, " << c.groups << " groups");
  const std::vector<int32_t> group = groups_of(c);
  const Tensor slots = slots_of(c);
  const int32_t top_k = static_cast<int32_t>(c.top_k);
  std::vector<std::tuple<int32_t, int32_t, int32_t>> pairs;  // (group, slot, t*K + k)
  std::set<std::pair<int32_t, int32_t>> visits;              // (group, t)
  std::map<std::pair<int32_t, int32_t>, int32_t> first;      // the first t*K + k of a visit
  const std::vector<int32_t> chosen = ints(slots);
  for (int32_t i = 0; i < slots.numel(); ++i) {
    const int32_t slot = chosen[static_cast<size_t>(i)], g = group[static_cast<size_t>(slot)];
    if (g < 0) continue;
    pairs.emplace_back(g, slot, i);
    visits.emplace(g, i / top_k);
    first.emplace(std::pair(g, i / top_k), i);
  }
  std::sort(pairs.begin(), pairs.end());
  const std::vector<std::pair<int32_t, int32_t>> sorted_visits(visits.begin(), visits.end());

  const DispatchPlan plan = make_dispatch_plan(slots, group, c.groups);
  if (default_device() == DeviceKind::kCpu) {
    ASSERT_EQ(plan.num_pairs, static_cast<int64_t>(pairs.size()));
    ASSERT_EQ(plan.num_visits, static_cast<int64_t>(visits.size()));
  }
  ASSERT_EQ(plan.num_pairs, plan.pair_token.numel());
  ASSERT_EQ(plan.num_visits, plan.visit_token.numel());
  std::vector<std::pair<int32_t, int32_t>> order;
  for (int32_t s = 0; s < c.slots; ++s) {
    if (group[static_cast<size_t>(s)] >= 0) order.emplace_back(group[static_cast<size_t>(s)], s);
  }
  std::sort(order.begin(), order.end());
  ASSERT_EQ(plan.slot_order.size(), order.size());
  for (size_t s = 0; s < order.size(); ++s) EXPECT_EQ(plan.slot_order[s], order[s].second);

  std::vector<int32_t> tokens, indices, pair_visits, positions, pair_groups, visit_tokens, visit_groups;
  std::vector<int32_t> index_pair(static_cast<size_t>(slots.numel()), -1);
  for (size_t p = 0; p < pairs.size(); ++p) {
    const auto [g, slot, index] = pairs[p];
    index_pair[static_cast<size_t>(index)] = static_cast<int32_t>(p);
    tokens.push_back(index / top_k), indices.push_back(index), pair_groups.push_back(g);
    const std::pair<int32_t, int32_t> visit{g, index / top_k};
    pair_visits.push_back(static_cast<int32_t>(std::lower_bound(sorted_visits.begin(), sorted_visits.end(), visit) -
                                               sorted_visits.begin()));
    const std::pair<int32_t, int32_t> position{g, slot};
    positions.push_back(static_cast<int32_t>(std::find(order.begin(), order.end(), position) - order.begin()));
  }
  std::vector<int32_t> visit_indices;
  for (const auto& [g, t] : sorted_visits) {
    visit_tokens.push_back(t), visit_groups.push_back(g), visit_indices.push_back(first.at({g, t}));
  }
  EXPECT_EQ(first_ints(plan.pair_token, tokens.size()), tokens);
  EXPECT_EQ(first_ints(plan.pair_index, indices.size()), indices);
  EXPECT_EQ(first_ints(plan.pair_visit, pair_visits.size()), pair_visits);
  EXPECT_EQ(ints(plan.index_pair), index_pair);
  EXPECT_EQ(first_ints(plan.visit_token, visit_tokens.size()), visit_tokens);
  EXPECT_EQ(first_ints(plan.visit_index, visit_indices.size()), visit_indices);
  EXPECT_EQ(ints(plan.slot_offsets), offsets_of(positions, static_cast<int32_t>(order.size())));
  EXPECT_EQ(ints(plan.group_offsets), offsets_of(visit_groups, static_cast<int32_t>(c.groups)));
  EXPECT_EQ(ints(plan.pair_group_offsets), offsets_of(pair_groups, static_cast<int32_t>(c.groups)));

  const std::vector<int32_t> token_visit = ints(plan.token_visit);
  for (int64_t t = 0; t < c.tokens; ++t) {  // each visit of the token once, then -1
    std::set<int32_t> expected;
    for (size_t v = 0; v < sorted_visits.size(); ++v) {
      if (sorted_visits[v].second == t) expected.insert(static_cast<int32_t>(v));
    }
    const int32_t* row = token_visit.data() + t * c.top_k;
    const std::set<int32_t> actual(row, row + expected.size());
    EXPECT_EQ(actual, expected);
    for (int64_t k = static_cast<int64_t>(expected.size()); k < c.top_k; ++k) EXPECT_EQ(row[k], -1);
  }
}

// However the device sorts.
template <class Body>
void on_each_sort(Body&& body) {
  testing::on_each_device<FillDispatchPlan>([&] {
    for (const DispatchSort sort : {DispatchSort::kCounting, DispatchSort::kRadix, DispatchSort::kCub}) {
      if (sort == DispatchSort::kCub && default_device() != DeviceKind::kCuda) continue;
      if (sort == DispatchSort::kRadix && default_device() == DeviceKind::kCpu) continue;
      SCOPED_TRACE(::testing::Message() << "sort " << static_cast<int>(sort));
      set_dispatch_sort(sort);
      body();
      set_dispatch_sort(DispatchSort::kCounting);
    }
  });
}

TEST(DispatchPlan, MatchesTheDefinition) {
  on_each_sort([] {
    for (const auto& c : cases::dispatch_plan) check_case(c);
  });
}

// Worked by hand: slots 0 and 2 share expert 1, slot 1 has expert 0, slot 3 is removed.
void check_small_example() {
  const Tensor slots = Tensor::from<int32_t>({2, 0, /**/ 3, 1, /**/ 0, 1}, {3, 2});
  const DispatchPlan plan = make_dispatch_plan(slots, {1, 0, 1, -1}, 2);
  EXPECT_EQ(plan.slot_order, (std::vector<int32_t>{1, 0, 2}));
  EXPECT_EQ(first_ints(plan.pair_index, 5), (std::vector<int32_t>{3, 5, 1, 4, 0}));
  EXPECT_EQ(first_ints(plan.pair_token, 5), (std::vector<int32_t>{1, 2, 0, 2, 0}));
  EXPECT_EQ(ints(plan.slot_offsets), (std::vector<int32_t>{0, 2, 4, 5}));
  EXPECT_EQ(first_ints(plan.pair_visit, 5), (std::vector<int32_t>{0, 1, 2, 3, 2}));
  EXPECT_EQ(first_ints(plan.visit_token, 4), (std::vector<int32_t>{1, 2, 0, 2}));
  EXPECT_EQ(first_ints(plan.visit_index, 4), (std::vector<int32_t>{3, 5, 0, 4}));
  EXPECT_EQ(ints(plan.group_offsets), (std::vector<int32_t>{0, 2, 4}));
  EXPECT_EQ(ints(plan.pair_group_offsets), (std::vector<int32_t>{0, 2, 5}));
  EXPECT_EQ(ints(plan.token_visit), (std::vector<int32_t>{2, -1, 0, -1, 3, 1}));
  EXPECT_EQ(ints(plan.index_pair), (std::vector<int32_t>{4, 2, -1, 0, 3, 1}));
}

TEST(DispatchPlan, SmallExample) { on_each_sort(check_small_example); }

TEST(DispatchPlan, RefusesSlotsOutOfRange) {
  // Not on a GPU, which a trap would take away from all later tests.
  for (const DeviceKind device : {DeviceKind::kCpu, DeviceKind::kSim}) {
    const DeviceScope scope(device);
    for (const int32_t slot : {-1, 2}) {
      EXPECT_THROW(make_dispatch_plan(Tensor::from<int32_t>({slot}, {1, 1}), {0, 0}, 1), Error);
    }
  }
  EXPECT_THROW(make_dispatch_plan(Tensor::from<int32_t>({0}, {1, 1}), {1}, 1), Error);
  EXPECT_THROW(make_dispatch_plan(Tensor::from<int32_t>({0}, {1, 1}), {-2}, 1), Error);
}

}  // namespace
}  // namespace lightmoe
