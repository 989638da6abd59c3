#include "kernels/combine.h"

#include "bench/op_bench.h"
#include "kernels/dispatch_plan.h"
#include "tests/cases/combine.h"

namespace lightmoe {
namespace {

// The rows of a layer of 64 slots in `groups` groups: gated sums over [P, expert width], combine over [V, width].
void add(const cases::CombineCase& c, int64_t groups, DType dtype) {
  const std::string suffix = fmt::format("/{}/{}x{}groups{}x{}", name_of(dtype), c.tokens, c.top_k, groups, c.width);
  std::vector<int32_t> group_of_slot(64);
  for (size_t s = 0; s < group_of_slot.size(); ++s)
    group_of_slot[s] = static_cast<int32_t>(static_cast<int64_t>(s) % groups);
  const auto plan = [=] {
    return make_dispatch_plan(bench::random_ids({c.tokens, c.top_k}, 64), group_of_slot, groups);
  };
  bench::add("op/dispatch_plan" + suffix, [=] {
    const Tensor slots = bench::random_ids({c.tokens, c.top_k}, 64);
    return bench::Work{.bytes = 24.0 * static_cast<double>(slots.numel()), .run = [=] {
                         benchmark::DoNotOptimize(make_dispatch_plan(slots, group_of_slot, groups).num_pairs);
                       }};
  });
  bench::add("op/gated_sum" + suffix, [=] {
    const DispatchPlan p = plan();
    const Tensor a = bench::random({p.num_pairs, c.width}, dtype), s = Tensor::empty({p.num_visits, c.width}, dtype);
    const GatedSum op{.a = a,
                      .gates = bench::random({c.tokens, c.top_k}, DType::kF32),
                      .pair_index = p.pair_index,
                      .pair_visit = p.pair_visit,
                      .s = s};
    return bench::Work{.bytes = bench::bytes_of({a, s}), .run = [=] { run(op); }};
  });
  bench::add("op/gated_sum_backward" + suffix, [=] {
    const DispatchPlan p = plan();
    const Tensor a = bench::random({p.num_pairs, c.width}, dtype), ds = bench::random({p.num_visits, c.width}, dtype);
    const Tensor gates = bench::random({c.tokens, c.top_k}, DType::kF32);
    const GatedSumBackward op{.a = a,
                              .ds = ds,
                              .gates = gates,
                              .pair_index = p.pair_index,
                              .pair_visit = p.pair_visit,
                              .da = a.clone(),
                              .dgates = gates.clone()};
    return bench::Work{.bytes = bench::bytes_of({a, ds, op.da}), .run = [=] { run(op); }};
  });
  bench::add("op/combine" + suffix, [=] {
    const DispatchPlan p = plan();
    const Tensor x = bench::random({p.num_visits, c.width}, dtype), y = Tensor::empty({c.tokens, c.width}, dtype);
    return bench::Work{.bytes = bench::bytes_of({x, y}),
                       .run = [=] { run(Combine{.x = x, .index = p.token_visit, .y = y}); }};
  });
}

const bool registered = bench::registered([] {
  for (const auto& c : cases::combine) add(c, 64, DType::kF32);
  for (const DType dtype : bench::kStorageTypes) {
    for (const int64_t groups : {64, 32})
      add({1024, 8, 0, 1024}, groups, dtype), add({1024, 8, 0, 2048}, groups, dtype);
  }
});

}  // namespace
}  // namespace lightmoe
