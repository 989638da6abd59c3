// The fused ops of kernels/adapter_chain.h on a case worked by hand, and what they refuse.

#include "kernels/adapter_chain.h"

#include <cmath>

#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::close;

// By hand: one token, two slots of one base, rank 1, one column. h0 = (1, 2), u = (1, 3), B_gate = -1, B_up = 2: h = (0, 8), so a = 0; the
// other slot has no adapter: a = 2 silu(1).
TEST(AdapterChain, TwoSlotsOfOneBaseByHand) {
  testing::on_each_device<AdapterChain, LowRankCombine>([] {
    const Tensor slots = Tensor::from<int32_t>({0, 1}, {1, 2});
    const DispatchPlan plan = make_dispatch_plan(slots, {0, 0}, 1);
    const auto one = [](float v) { return Tensor::from<float>({v}, {1, 1}); };
    const AdapterMatrices adapters{{one(-1), Tensor()}, {one(2), Tensor()}, {one(5), Tensor()}};
    const Tensor visits = Tensor::zeros({plan.num_visits, 1}, DType::kF32), w = Tensor::zeros({2, 1}, DType::kF32);
    run(AdapterChain{.plan = plan,
                     .adapters = adapters,
                     .h0 = Tensor::from<float>({1, 2}, {1, 2}),
                     .u = Tensor::from<float>({1, 3, 0, 0}, {2, 2}),
                     .gates = Tensor::from<float>({10, 0.5}, {1, 2}),
                     .s = visits,
                     .w = w});
    const double silu = 1 / (1 + std::exp(-1.0));
    EXPECT_TRUE(close(visits, {silu}, 1e-6));
    EXPECT_TRUE(close(w, {0, 0}, 0));
    // y = row + M z of the first slot: 4 + 3 * 7
    const Tensor y = Tensor::zeros({1, 1}, DType::kF32);
    run(LowRankCombine{.plan = plan,
                       .rows = one(4),
                       .z = Tensor::from<float>({7, 9}, {2, 1}),
                       .matrices = {one(3), Tensor()},
                       .y = y});
    EXPECT_TRUE(close(y, {25}, 0));
  });
}

TEST(AdapterChain, RefusesWrongArguments) {
  const DispatchPlan plan = make_dispatch_plan(Tensor::from<int32_t>({0, 1}, {1, 2}), {0, 0}, 1);
  const Tensor b = Tensor::zeros({4, 65}, DType::kF32), a = Tensor::zeros({65, 4}, DType::kF32);
  AdapterMatrices adapters{{b, b}, {b, b}, {a, a}};
  const Tensor h0 = Tensor::zeros({1, 8}, DType::kF32), u = Tensor::zeros({2, 130}, DType::kF32),
               gates = Tensor::zeros({1, 2}, DType::kF32), s = Tensor::zeros({1, 4}, DType::kF32),
               w = Tensor::zeros({2, 65}, DType::kF32);
  const AdapterChain op{.plan = plan, .adapters = adapters, .h0 = h0, .u = u, .gates = gates, .s = s, .w = w};
  EXPECT_THROW(run(op), Error);  // rank above the limit
  adapters = {{Tensor(), Tensor()}, {Tensor(), b}, {Tensor(), Tensor()}};
  EXPECT_THROW(run(op), Error);  // one matrix of three
}

}  // namespace
}  // namespace lightmoe
