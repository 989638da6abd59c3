// The fused router against the two ops it stands for: the same bits everywhere.

#include "kernels/router_dispatch.h"

#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::bits_equal;
using testing::Guarded;
using testing::random_tensor;

struct Case {
  int64_t tokens, width, slots, top_k, groups;
};
// Around a block's 32 tokens, several chunks, every slot chosen, slots without group, several slots to a group.
const Case kCases[] = {{0, 8, 4, 2, 2},     {1, 24, 64, 8, 64},   {5, 8, 5, 5, 5},
                       {31, 16, 8, 3, 3},   {32, 40, 64, 8, 20},  {33, 40, 64, 8, 64},
                       {65, 17, 12, 1, 12}, {300, 16, 100, 8, 7}, {9, 8, 40, 40, 30}};

struct Outputs {
  Guarded logits, probs, slots, gates;
  explicit Outputs(const Case& c)
      : logits({c.tokens, c.slots}, DType::kF32),
        probs({c.tokens, c.slots}, DType::kF32),
        slots({c.tokens, c.top_k}, DType::kI32),
        gates({c.tokens, c.top_k}, DType::kF32) {}
  Router op(const Tensor& x, const Tensor& w) const {
    return {.x = x,
            .w = w,
            .removed = {},
            .top_k = slots.tensor().dim(1),
            .logits = logits.tensor(),
            .probs = probs.tensor(),
            .slots = slots.tensor(),
            .gates = gates.tensor()};
  }
};

// The router never chooses the last entry, which stands for "dropped", as in a model's groups.
std::vector<int32_t> groups_of(const Case& c) {
  std::vector<int32_t> group(static_cast<size_t>(c.slots) + 1, -1);
  for (int64_t s = 0; s < c.slots; ++s) {
    group[static_cast<size_t>(s)] = static_cast<int32_t>(c.groups == c.slots ? s : s * 7 % (c.groups + 1) - 1);
  }
  return group;
}

void expect_same(const DispatchPlan& a, const DispatchPlan& b) {
  EXPECT_EQ(a.num_pairs, b.num_pairs);
  EXPECT_EQ(a.num_visits, b.num_visits);
  EXPECT_EQ(a.slot_order, b.slot_order);
  EXPECT_EQ(a.group_positions, b.group_positions);
  const std::pair<const char*, Tensor DispatchPlan::*> lists[] = {
      {"pair_token", &DispatchPlan::pair_token},       {"pair_index", &DispatchPlan::pair_index},
      {"pair_visit", &DispatchPlan::pair_visit},       {"slot_offsets", &DispatchPlan::slot_offsets},
      {"visit_token", &DispatchPlan::visit_token},     {"visit_index", &DispatchPlan::visit_index},
      {"group_offsets", &DispatchPlan::group_offsets}, {"pair_group_offsets", &DispatchPlan::pair_group_offsets},
      {"token_visit", &DispatchPlan::token_visit},     {"index_pair", &DispatchPlan::index_pair}};
  for (const auto& [name, list] : lists) EXPECT_TRUE(bits_equal(a.*list, b.*list)) << name;
}

TEST(RouterDispatch, SameAsTheTwoOps) {
  testing::on_each_device<Router, FillDispatchPlan>([] {
    for (const Case& c : kCases) {
      SCOPED_TRACE(::testing::Message() << c.tokens << " tokens, " << c.top_k << " of " << c.slots << " slots, "
                                        << c.groups << " groups");
      for (const DType dtype : testing::floating_dtypes()) {
        if (dtype == DType::kF64) continue;
        const Tensor x = random_tensor({c.tokens, c.width}, dtype, 1), w = random_tensor({c.slots, c.width}, dtype, 2);
        const Outputs two(c), one(c);
        run(two.op(x, w));
        const DispatchPlan expected = make_dispatch_plan(two.slots.tensor(), groups_of(c), c.groups);
        const DispatchPlan plan = run_router_dispatch(one.op(x, w), groups_of(c), c.groups);
        EXPECT_TRUE(bits_equal(one.logits.tensor(), two.logits.tensor()));
        EXPECT_TRUE(bits_equal(one.probs.tensor(), two.probs.tensor()));
        EXPECT_TRUE(bits_equal(one.slots.tensor(), two.slots.tensor()));
        EXPECT_TRUE(bits_equal(one.gates.tensor(), two.gates.tensor()));
        expect_same(plan, expected);
      }
    }
  });
}

TEST(RouterDispatch, RefusesGroupsOfFewerSlots) {
  testing::on_each_device<RouterDispatch>([] {
    const Case c{3, 8, 4, 2, 2};
    const Outputs out(c);
    const Tensor x = random_tensor({3, 8}, DType::kF32, 1), w = random_tensor({4, 8}, DType::kF32, 2);
    EXPECT_THROW(run_router_dispatch(out.op(x, w), {0, 1, 0}, 2), Error);
    EXPECT_THROW(run_router_dispatch(out.op(x, w), {0, 1, 0, 2}, 2), Error);
  });
}

}  // namespace
}  // namespace lightmoe
