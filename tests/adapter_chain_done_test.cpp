// Groups that are done (kernels/adapter_chain.h) keep what stood in their rows; the others get the bits they get when none is done.

#include <algorithm>

#include "kernels/adapter_chain.h"
#include "tests/cases/adapter_chain.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::random_tensor;

// Slots of a token: neighbours, so that all groups are met.
Tensor choose(const cases::AdapterChainCase& c) {
  std::vector<int32_t> chosen;
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t k = 0; k < c.top_k; ++k) {
      chosen.push_back(static_cast<int32_t>((c.skewed ? k : t + k) % std::ssize(c.group_of_slot)));
    }
  }
  return Tensor::from(chosen, {c.tokens, c.top_k});
}

std::vector<int32_t> integers(const Tensor& t) {
  const Tensor host = t.on(DeviceKind::kCpu);
  return {host.data<int32_t>(), host.data<int32_t>() + host.numel()};
}

// Slots of groups that are done have none, whatever the case says.
AdapterMatrices adapters_of(const cases::AdapterChainCase& c, const DispatchPlan& plan, DType dtype,
                            const std::vector<uint8_t>& done) {
  AdapterMatrices adapters;
  for (size_t i = 0; i < plan.slot_order.size(); ++i) {
    const auto slot = static_cast<size_t>(plan.slot_order[i]);
    const bool of_done = done[static_cast<size_t>(c.group_of_slot[slot])] != 0;
    const int64_t rank = of_done ? 0 : c.rank_of_slot[slot];
    const auto matrix = [&](const Shape& shape, uint64_t seed) {
      return rank == 0 ? Tensor() : random_tensor(shape, dtype, seed + 10 * i);
    };
    adapters.b_gate.push_back(matrix({c.width, rank}, 1));
    adapters.b_up.push_back(matrix({c.width, rank}, 2));
    adapters.a_down.push_back(matrix({rank, c.width}, 3));
  }
  return adapters;
}

struct Layer {
  const cases::AdapterChainCase& c;
  DType dtype;
  Tensor slots;
  DispatchPlan plan;
  std::vector<uint8_t> done;
  AdapterMatrices adapters;
  int64_t rank = 0;

  // even: whether groups of even number are done; the others are if these are not.
  Layer(const cases::AdapterChainCase& test, DType rows, bool even) : c(test), dtype(rows), slots(choose(c)) {
    const int32_t groups = *std::max_element(c.group_of_slot.begin(), c.group_of_slot.end()) + 1;
    plan = make_dispatch_plan(slots, c.group_of_slot, groups);
    for (int32_t g = 0; g < groups; ++g) done.push_back((g % 2 == 0) == even ? 1 : 0);
    adapters = adapters_of(c, plan, dtype, done);
    for (size_t i = 0; i < plan.slot_order.size(); ++i) rank = std::max(rank, adapters.rank(i));
  }
  Tensor visits(int64_t width, uint64_t seed) const { return random_tensor({plan.num_visits, width}, dtype, seed); }
  Tensor pairs(int64_t width, uint64_t seed) const {
    return rank == 0 ? Tensor() : random_tensor({plan.num_pairs, width}, dtype, seed);
  }
};

struct Results {
  Tensor s, again, dh0;  // rows of visits
  Tensor w, du;          // rows of pairs
  Tensor dgates;
  explicit Results(const Layer& layer)
      : s(layer.visits(layer.c.width, 11)),
        again(layer.visits(layer.c.width, 12)),
        dh0(layer.visits(2 * layer.c.width, 13)),
        w(layer.pairs(layer.rank, 14)),
        du(layer.pairs(2 * layer.rank, 15)),
        dgates(random_tensor({layer.c.tokens, layer.c.top_k}, DType::kF32, 16)) {}
};

Results results_of(const Layer& layer, const std::vector<uint8_t>& done) {
  const Results out(layer);
  const Tensor h0 = layer.visits(2 * layer.c.width, 1), u = layer.pairs(2 * layer.rank, 2),
               gates = random_tensor({layer.c.tokens, layer.c.top_k}, DType::kF32, 3);
  run(AdapterChain{.plan = layer.plan,
                   .adapters = layer.adapters,
                   .h0 = h0,
                   .u = u,
                   .gates = gates,
                   .s = out.s,
                   .w = out.w,
                   .done = done});
  run(AdapterChainBackward{.plan = layer.plan,
                           .adapters = layer.adapters,
                           .h0 = h0,
                           .u = u,
                           .gates = gates,
                           .ds = layer.visits(layer.c.width, 4),
                           .e = layer.pairs(layer.rank, 5),
                           .dh0 = out.dh0,
                           .du = out.du,
                           .dgates = out.dgates,
                           .s = out.again,
                           .done = done});
  return out;
}

void check_done(const cases::AdapterChainCase& c, DType dtype, bool even) {
  const Layer layer(c, dtype, even);
  const std::vector<uint8_t>& done = layer.done;
  const Results before(layer), all = results_of(layer, {}), some = results_of(layer, done);
  const auto check_rows = [&](const char* name, const Tensor& offsets, Tensor Results::*rows) {
    const std::vector<int32_t> begins = integers(offsets);
    for (size_t g = 0; g < done.size(); ++g) {
      const auto of_group = [&](const Results& r) { return (r.*rows).slice(begins[g], begins[g + 1]); };
      EXPECT_TRUE(testing::bits_equal(of_group(some), of_group(done[g] != 0 ? before : all)))
          << name << " of group " << g << ", done " << int{done[g]};
    }
  };
  check_rows("s", layer.plan.group_offsets, &Results::s);
  check_rows("s in backward", layer.plan.group_offsets, &Results::again);
  check_rows("dh0", layer.plan.group_offsets, &Results::dh0);
  if (layer.rank > 0) check_rows("w", layer.plan.pair_group_offsets, &Results::w);
  if (layer.rank > 0) check_rows("du", layer.plan.pair_group_offsets, &Results::du);
  const std::vector<int32_t> chosen = integers(layer.slots);
  const std::vector<double> old = testing::to_doubles(before.dgates), whole = testing::to_doubles(all.dgates),
                            part = testing::to_doubles(some.dgates);
  for (size_t i = 0; i < chosen.size(); ++i) {
    const int32_t g = c.group_of_slot[static_cast<size_t>(chosen[i])];
    EXPECT_EQ(part[i], g < 0 || done[static_cast<size_t>(g)] != 0 ? old[i] : whole[i]) << "dgates, choice " << i;
  }
}

TEST(AdapterChain, LeavesDoneGroupsAlone) {
  testing::on_each_device<AdapterChain, AdapterChainBackward>([] {
    size_t turn = 0;
    for (const cases::AdapterChainCase& c : cases::adapter_chain) {
      if (std::ranges::all_of(c.rank_of_slot, [](int64_t r) { return r == 0; })) continue;
      ++turn;
      for (const DType dtype : {DType::kF32, DType::kBF16}) {
        if (!testing::is_run_now(turn + (dtype == DType::kBF16), 2)) continue;
        SCOPED_TRACE(::testing::Message() << c.tokens << " tokens, width " << c.width << ", " << name_of(dtype));
        check_done(c, dtype, true);
        check_done(c, dtype, false);
      }
    }
  });
}

TEST(AdapterChain, RefusesDoneGroupsWithAdapters) {
  const Layer layer(cases::adapter_chain[1], DType::kF32, false);  // group 1 is done; group 0 has the adapters
  std::vector<uint8_t> all = {1, 1}, few = {1};
  EXPECT_THROW(results_of(layer, all), Error);
  EXPECT_THROW(results_of(layer, few), Error);
}

}  // namespace
}  // namespace lightmoe
