#include "kernels/merge_slots.h"

#include <map>

#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::to_doubles;

// Random distinct slots for each token; slots with the same remainder modulo `lanes` compute the same.
struct Choice {
  int64_t tokens, top_k;
  std::vector<int32_t> slots, lane_of_slot;
  Choice(int64_t tokens, int64_t top_k, int32_t count, int32_t lanes) : tokens(tokens), top_k(top_k) {
    Philox random(static_cast<uint64_t>(tokens * 31 + lanes));
    for (int32_t e = 0; e < count; ++e) lane_of_slot.push_back(e % lanes);
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t first = static_cast<int32_t>(random.below(static_cast<uint64_t>(count)));
      for (int32_t k = 0; k < top_k; ++k) slots.push_back((first + 5 * k) % count);  // 5 shares no factor with count
    }
  }
};

void check_case(const Choice& c, DType dtype) {
  const Shape shape{c.tokens, c.top_k};
  const int64_t count = static_cast<int64_t>(c.lane_of_slot.size());
  const Tensor slots = Tensor::from(c.slots, shape), lanes = Tensor::from(c.lane_of_slot, {count});
  const Tensor gates = testing::random_tensor(shape, dtype, 1), dmerged = testing::random_tensor(shape, dtype, 2);
  const Guarded merged(shape, DType::kI32), first(shape, DType::kI32), merged_gates(shape, dtype), dgates(shape, dtype);
  run(MergeSlots{.slots = slots,
                 .gates = gates,
                 .lane_of_slot = lanes,
                 .merged_slots = merged.tensor(),
                 .merged_gates = merged_gates.tensor(),
                 .first = first.tensor()});
  run(MergeSlotsBackward{.dmerged = dmerged, .first = first.tensor(), .dgates = dgates.tensor()});

  std::vector<double> slot(c.slots.size(), static_cast<double>(count)), gate(c.slots.size(), 0.0), place, gradient;
  const std::vector<double> gs = to_doubles(gates), ds = to_doubles(dmerged);
  std::map<int32_t, size_t> place_of;
  for (size_t i = 0; i < c.slots.size(); ++i) {
    const size_t k = i % static_cast<size_t>(c.top_k), row = i - k;
    if (k == 0) place_of.clear();
    if (c.slots[i] == count) {  // not to be evaluated
      place.push_back(static_cast<double>(k));
      gradient.push_back(ds[i]);
      continue;
    }
    const int32_t lane = c.lane_of_slot[static_cast<size_t>(c.slots[i])];
    const size_t at = place_of.emplace(lane, k).first->second;
    slot[row + at] = lane;
    gate[row + at] += gs[i];
    place.push_back(static_cast<double>(at));
    gradient.push_back(ds[row + at]);
  }
  EXPECT_TRUE(testing::close(merged.tensor(), slot, 0));
  EXPECT_TRUE(testing::close(first.tensor(), place, 0));
  EXPECT_TRUE(testing::close(merged_gates.tensor(), gate, testing::sum_tolerance(dtype, c.top_k)));
  EXPECT_TRUE(testing::close(dgates.tensor(), gradient, 0));
}

// Nothing, one choice, all choices in one lane, no two in one, and OLMoE's 8 of 64.
TEST(MergeSlots, MatchesTheEquation) {
  testing::on_each_device<MergeSlots, MergeSlotsBackward>([] {
    for (const DType dtype : {DType::kF32, DType::kF64}) {
      check_case(Choice(0, 2, 4, 2), dtype);
      check_case(Choice(1, 1, 1, 1), dtype);
      check_case(Choice(31, 4, 7, 1), dtype);
      check_case(Choice(33, 3, 8, 8), dtype);
      check_case(Choice(257, 8, 64, 9), dtype);
    }
  });
}

// Every third choice is dropped beforehand.
TEST(MergeSlots, LeavesDroppedChoicesDropped) {
  testing::on_each_device<MergeSlots, MergeSlotsBackward>([] {
    Choice c(33, 8, 64, 9);
    for (size_t i = 0; i < c.slots.size(); i += 3) c.slots[i] = 64;
    check_case(c, DType::kF32);
  });
}

TEST(MergeSlots, RefusesWrongShapes) {
  const Tensor slots = Tensor::zeros({2, 3}, DType::kI32), gates = Tensor::zeros({2, 3}, DType::kF32);
  const Tensor wrong = Tensor::zeros({2, 2}, DType::kF32);
  EXPECT_THROW(run(MergeSlots{.slots = slots,
                              .gates = gates,
                              .lane_of_slot = Tensor::zeros({4}, DType::kI32),
                              .merged_slots = slots.clone(),
                              .merged_gates = wrong,
                              .first = slots.clone()}),
               Error);
  EXPECT_THROW(run(MergeSlotsBackward{.dmerged = wrong, .first = slots, .dgates = gates}), Error);
}

}  // namespace
}  // namespace lightmoe
