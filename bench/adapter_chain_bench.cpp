#include "kernels/adapter_chain.h"

#include "bench/op_bench.h"

namespace lightmoe {
namespace {

// A layer of 64 slots, 38 of them on 3 bases, rank 16 everywhere (the method's setting at one half), uniform routing.
constexpr int64_t kSlots = 64, kReplaced = 38, kBases = 3, kTopK = 8, kWidth = 1024, kHidden = 2048, kRank = 16;

struct Setup {
  DispatchPlan plan;
  AdapterMatrices adapters;
  std::vector<Tensor> b_down;
  Tensor h0, u, gates, ds, e, s, w, dh0, du, dgates, rows, y;

  Setup(int64_t tokens, DType dtype) {
    std::vector<int32_t> group_of_slot;
    for (int64_t i = 0; i < kSlots; ++i) {
      group_of_slot.push_back(static_cast<int32_t>(i < kReplaced ? i % kBases : kBases + i - kReplaced));
    }
    plan = make_dispatch_plan(bench::random_ids({tokens, kTopK}, kSlots), group_of_slot, kBases + kSlots - kReplaced);
    for (int64_t i = 0; i < kSlots; ++i) {
      adapters.b_gate.push_back(bench::random({kWidth, kRank}, dtype));
      adapters.b_up.push_back(bench::random({kWidth, kRank}, dtype));
      adapters.a_down.push_back(bench::random({kRank, kWidth}, dtype));
      b_down.push_back(bench::random({kHidden, kRank}, dtype));
    }
    const int64_t visits = plan.num_visits, pairs = plan.num_pairs;
    h0 = bench::random({visits, 2 * kWidth}, dtype), u = bench::random({pairs, 2 * kRank}, dtype);
    gates = bench::random({tokens, kTopK}, DType::kF32), ds = bench::random({visits, kWidth}, dtype);
    e = bench::random({pairs, kRank}, dtype), s = ds.clone(), w = e.clone(), dh0 = h0.clone(), du = u.clone();
    dgates = gates.clone(), rows = bench::random({visits, kHidden}, dtype);
    y = Tensor::zeros({tokens, kHidden}, DType::kF32);
  }
  double pair_flops(double products) const {  // products of F x R for every pair
    return products * 2 * static_cast<double>(plan.num_pairs * kWidth * kRank);
  }
};

void add(int64_t tokens, DType dtype) {
  const std::string suffix = fmt::format("/{}/{}x{}rank{}", name_of(dtype), tokens, kTopK, kRank);
  const auto add_op = [&](const std::string& name, auto work) {
    bench::add("op/" + name + suffix, [=] {
      const auto in = std::make_shared<Setup>(tokens, dtype);
      return work(in);
    });
  };
  using In = std::shared_ptr<Setup>;
  add_op("adapter_chain", [](const In& in) {
    return bench::Work{
        .bytes = bench::bytes_of({in->h0, in->u, in->s, in->w}), .flops = in->pair_flops(3), .run = [in] {
          run(AdapterChain{.plan = in->plan,
                           .adapters = in->adapters,
                           .h0 = in->h0,
                           .u = in->u,
                           .gates = in->gates,
                           .s = in->s,
                           .w = in->w});
        }};
  });
  add_op("adapter_chain_backward", [](const In& in) {
    return bench::Work{.bytes = bench::bytes_of({in->h0, in->u, in->ds, in->e, in->dh0, in->du}),
                       .flops = in->pair_flops(5),
                       .run = [in] {
                         run(AdapterChainBackward{.plan = in->plan,
                                                  .adapters = in->adapters,
                                                  .h0 = in->h0,
                                                  .u = in->u,
                                                  .gates = in->gates,
                                                  .ds = in->ds,
                                                  .e = in->e,
                                                  .dh0 = in->dh0,
                                                  .du = in->du,
                                                  .dgates = in->dgates,
                                                  .s = {}});
                       }};
  });
  add_op("low_rank_combine", [](const In& in) {
    return bench::Work{
        .bytes = bench::bytes_of({in->rows, in->w, in->y}),
        .flops = 2 * static_cast<double>(in->plan.num_pairs * kHidden * kRank),
        .run = [in] {
          run(LowRankCombine{.plan = in->plan, .rows = in->rows, .z = in->w, .matrices = in->b_down, .y = in->y});
        }};
  });
}

const bool registered = bench::registered([] {
  for (const int64_t tokens : {8, 512}) add(tokens, DType::kBF16);
});

}  // namespace
}  // namespace lightmoe
