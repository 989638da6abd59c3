// Products of one MoE layer's experts at OLMoE's shape (hidden 2048, expert width 1024, 64 slots, 8 for each token), bf16, by every backend
// that has them: gemm/BACKEND/olmoe/WHAT/ROUTING/TOKENS.
//   gate_up          [rows of x, gathered] W_gu^T            gate_up_swiglu     the same with SwiGLU as its epilogue, h not stored
//   down             a W_d^T
//   down_back        dy W_d, gathered                        down_back_swiglu   the same with SwiGLU's backward and the gates' gradient
//   gate_up_weights  dh^T x of every expert, f32 sums (from 4096 tokens on)
// Routing: bench/routing.h. Counters as gemm/'s; TFLOP/s count the rows that there are. On a GPU for 1, 8, 64, 4096, 16384 and 65536 tokens,
// or what LIGHTMOE_BENCH_TOKENS lists.

#include <benchmark/benchmark.h>

#include "bench/routing.h"
#include "kernels/dispatch_plan.h"
#include "kernels/gemm.h"

namespace lightmoe::bench {
namespace {

constexpr int64_t kHidden = 2048, kWidth = 1024, kSlots = 64, kTopK = 8;

enum class What : uint8_t { kGateUp, kGateUpSwiGlu, kDown, kDownBack, kDownBackSwiGlu, kGateUpWeights };
constexpr const char* kNames[] = {"gate_up",   "gate_up_swiglu",   "down",
                                  "down_back", "down_back_swiglu", "gate_up_weights"};

// The experts' matrices stay for all cases: 384 MiB.
const std::vector<Tensor>& matrices(bool down) {
  static std::vector<Tensor> lists[2];
  std::vector<Tensor>& list = lists[down ? 1 : 0];
  while (std::ssize(list) < kSlots) {
    list.push_back(random(down ? Shape{kHidden, kWidth} : Shape{2 * kWidth, kHidden}, DType::kBF16));
  }
  return list;
}

struct Case {
  What what;
  RoutingKind routing;
  int64_t tokens;
};

GroupedGemmM product_of(const Case& c, const DispatchPlan& plan) {
  const int64_t rows = plan.num_visits;
  const bool down = c.what != What::kGateUp && c.what != What::kGateUpSwiGlu;
  GroupedGemmM op{.a = {}, .a_rows = {}, .offsets = plan.group_offsets, .b = matrices(down), .c = {}};
  op.compute = GemmCompute::kBF16;
  op.a = random({c.what == What::kDown ? rows : c.tokens, c.what == What::kDown ? kWidth : kHidden}, DType::kBF16);
  if (c.what != What::kDown) op.a_rows = plan.visit_token;
  op.trans_b = c.what == What::kGateUp || c.what == What::kGateUpSwiGlu || c.what == What::kDown;
  const auto bf16_rows = [&](int64_t width) { return Tensor::zeros({rows, width}, DType::kBF16); };
  GemmEpilogue& e = op.epilogue;
  if (c.what == What::kGateUpSwiGlu || c.what == What::kDownBackSwiGlu) {
    e.scales = random({c.tokens, kTopK}, DType::kF32), e.scale_rows = plan.visit_index;
  }
  switch (c.what) {
    case What::kGateUpSwiGlu:
      e.kind = GemmEpilogueKind::kSwiGlu, e.activated = bf16_rows(kWidth);
      break;
    case What::kDownBackSwiGlu:
      e.kind = GemmEpilogueKind::kSwiGluBackward, e.h = random({rows, 2 * kWidth}, DType::kBF16);
      e.activated = bf16_rows(kWidth), e.dots = Tensor::zeros({c.tokens, kTopK}, DType::kF32);
      op.c = bf16_rows(2 * kWidth);
      break;
    case What::kDownBack:
      op.c = bf16_rows(kWidth);
      break;
    default:
      op.c = bf16_rows(c.what == What::kGateUp ? 2 * kWidth : kHidden);
  }
  return op;
}

GroupedGemmK weights_of(const Case& c, const DispatchPlan& plan) {
  GroupedGemmK op{.a = random({plan.num_visits, 2 * kWidth}, DType::kBF16),
                  .a_rows = {},
                  .b = random({c.tokens, kHidden}, DType::kBF16),
                  .b_rows = plan.visit_token,
                  .offsets = plan.group_offsets,
                  .c = {}};
  op.compute = GemmCompute::kBF16;
  for (int64_t s = 0; s < kSlots; ++s) op.c.push_back(Tensor::zeros({2 * kWidth, kHidden}, DType::kF32));
  return op;
}

template <class Op>
void time_op(benchmark::State& state, const std::string& backend, const Op& op, double rows) {
  const GemmDesc desc = describe(op);
  const bool known =
      std::ranges::any_of(gemm_backends(), [&](const GemmBackend& b) { return b.name == backend && b.supports(desc); });
  if (!known) return state.SkipWithError("not for this device, kind or epilogue");
  const double columns = static_cast<double>(std::is_same_v<Op, GroupedGemmK> ? desc.m * desc.n : desc.n * desc.k);
  const GemmBackendScope scope(backend);
  measure(state, {.flops = 2 * rows * columns, .run = [&] { run(op); }}, false);
  state.counters["of_gemm"] = state.counters["best_GFLOP/s"].value * 1e9 / measured_ceilings().bf16_flop;
}

void time_case(benchmark::State& state, const std::string& backend, const Case& c) {
  measured_ceilings();
  std::vector<int32_t> group_of_slot;
  for (int32_t s = 0; s < kSlots; ++s) group_of_slot.push_back(s);
  const Tensor slots = Tensor::from(choose_slots(c.tokens, kSlots, kTopK, c.routing), {c.tokens, kTopK});
  const DispatchPlan plan = make_dispatch_plan(slots, group_of_slot, kSlots);
  const auto rows = static_cast<double>(c.tokens * kTopK);
  if (c.what == What::kGateUpWeights) return time_op(state, backend, weights_of(c, plan), rows);
  time_op(state, backend, product_of(c, plan), rows);
}

const bool all = registered([] {
  for (const char* const backend : {"native", "simple", "gemv", "mma", "wgmma", "cublas"}) {
    for (size_t what = 0; what < std::size(kNames); ++what) {
      for (const RoutingKind routing : {RoutingKind::kUniform, RoutingKind::kSkewed}) {
        for (const int64_t tokens : token_counts("1,8,64,4096,16384,65536")) {
          const Case c{static_cast<What>(what), routing, tokens};
          if (c.what == What::kGateUpWeights && tokens < 4096) continue;
          const std::string name = fmt::format("gemm/{}/olmoe/{}/{}/{}", backend, kNames[what],
                                               kRoutingNames[static_cast<int>(routing)], tokens);
          const auto body = [backend = std::string(backend), c](benchmark::State& s) { time_case(s, backend, c); };
          benchmark::RegisterBenchmark(name.c_str(), body)->UseManualTime()->Unit(benchmark::kMicrosecond);
        }
      }
    }
  }
});

}  // namespace
}  // namespace lightmoe::bench
