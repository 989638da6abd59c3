// The experts of one MoE layer at OLMoE's shape, forward and backward apart: layer/<shape>/<kind>/<numbers>/<routing>/<tokens>/<phase>.
// Kinds are those of model_session.h. Routing: uniform; skewed (slot s as likely as 1 / (1 + s)); one (every token chooses the same
// slots). A compressed layer stands with /per_slot, too, where every slot runs its base for itself (base-once off), and with /steps, in
// the step-by-step form instead of the fused kernels. FLOPs are those of what is computed base-once: forward 6 n d for each stored expert
// that a token meets, once, and 6 R (n + d) for each adapter; backward twice that where weights train, else as much again as forward. For
// the original and uniform routing this is the published convention 6 T K n d. Counters: bases/token and replaced/token say how much
// there was to share; tokens_bases=N and tokens_replaced=N are the histograms, shares of the tokens with N distinct bases and N replaced slots
// among their choices. The median and spread of the times are as in op_bench.h. On a GPU LIGHTMOE_BENCH_TOKENS lists the numbers of tokens (1,8,64,4096,32768 when unset); elsewhere 1 and 64.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <set>

#include "bench/gpu_clocks.h"
#include "bench/model_session.h"
#include "bench/routing.h"
#include "model/moe_op.h"

namespace lightmoe::bench {
namespace {

constexpr const char* kNames[] = {"original", "lightmoe-30", "lightmoe-40", "lightmoe-50", "recovery", "annealing"};

struct LayerCase {
  std::string shape;
  ModelKind kind;
  DType dtype;
  RoutingKind routing;
  int64_t tokens;
  bool backward;
  MoeExecution execution = {};
};

struct Load {
  double flops = 0;
  std::vector<double> bases, replaced;  // [N]: share of the tokens with N distinct bases, N replaced slots
};
double mean_of(const std::vector<double>& histogram) {
  double sum = 0;
  for (size_t n = 0; n < histogram.size(); ++n) sum += static_cast<double>(n) * histogram[n];
  return sum;
}
Load load_of(const MoeLayer& moe, const OlmoeConfig& c, const std::vector<int32_t>& slots, int64_t tokens) {
  Load load;
  const auto n = static_cast<double>(c.intermediate_size), d = static_cast<double>(c.hidden_size);
  const int64_t k = c.num_experts_per_token;
  load.bases = load.replaced = std::vector<double>(static_cast<size_t>(k) + 1, 0);
  for (int64_t t = 0; t < tokens; ++t) {
    std::set<int32_t> stored, shared;
    size_t replaced = 0;
    for (int64_t i = 0; i < k; ++i) {
      const Slot& slot = moe.slots[static_cast<size_t>(slots[static_cast<size_t>(t * k + i)])];
      stored.insert(slot.expert);
      if (slot.adapter < 0) continue;
      load.flops += 6 * static_cast<double>(moe.adapters[static_cast<size_t>(slot.adapter)].rank()) * (n + d);
      ++replaced, shared.insert(slot.expert);
    }
    load.flops += 6 * n * d * static_cast<double>(stored.size());
    load.bases[shared.size()] += 1 / static_cast<double>(tokens);
    load.replaced[replaced] += 1 / static_cast<double>(tokens);
  }
  return load;
}

// One layer in memory at a time: its model has a small vocabulary and nothing else of size.
const Olmoe& layer_model(const LayerCase& c) {
  static std::unique_ptr<Olmoe> model;
  static std::string key;
  const std::string wanted = fmt::format("{} {} {}", c.shape, static_cast<int>(c.kind), name_of(c.dtype));
  if (key != wanted) {
    model.reset();
    trim_memory_cache();
    OlmoeConfig config = named_config(c.shape).value();
    config.num_layers = 1, config.vocab_size = 64;
    model = make_model(config, c.dtype, c.kind);
    key = wanted;
  }
  return *model;
}

void run_layer(benchmark::State& state, const LayerCase& c) {
  const MoeExecutionScope execution(c.execution);
  const Olmoe& model = layer_model(c);
  const MoeLayer& moe = model.blocks[0].moe;
  const int64_t k = model.config.num_experts_per_token;
  const std::vector<int32_t> chosen = choose_slots(c.tokens, model.config.num_experts, k, c.routing);
  const Tensor slots = Tensor::from(chosen, {c.tokens, k});
  const Tensor x = random({c.tokens, model.config.hidden_size}, c.dtype), gates = random({c.tokens, k}, DType::kF32);
  const Tensor dy = random({c.tokens, model.config.hidden_size}, c.dtype);
  const GemmCompute compute = c.dtype == DType::kBF16 ? GemmCompute::kBF16 : GemmCompute::kF32;
  const auto forward = [&](Tape& tape) {
    return moe_experts(tape, Tape::variable(x), moe, slots, Tape::variable(gates), compute);
  };
  const Load load = load_of(moe, model.config, chosen, c.tokens);
  const bool trains = !is_for_inference(c.kind);
  const double flops = load.flops * (c.backward ? (trains ? 2 : 1) : 1);
  DeviceTimer timer(default_device());
  std::vector<double> times;
  const GpuClocks clocks(state);
  for (auto _ : state) {
    Tape tape(c.backward);
    if (!c.backward) {
      flush_caches();
      timer.start();
      forward(tape);
    } else {
      const Var y = forward(tape);
      y.grad->add(dy.clone());
      timer.start();
      tape.backward();
    }
    const double seconds = timer.stop_us() * 1e-6;
    state.SetIterationTime(seconds);
    times.push_back(seconds);
  }
  bench::report_spread(state, times);
  const double best = percentile(times, 0);
  for (const ParameterPtr& p : moe.parameters()) p->grad.reset();
  using benchmark::Counter;
  state.counters["tokens/s"] = Counter(static_cast<double>(c.tokens), Counter::kIsIterationInvariantRate);
  state.counters["best_TFLOP/s"] = flops / best * 1e-12;
  const Ceilings& ceiling = measured_ceilings();
  state.counters["of_gemm"] = flops / best / (compute == GemmCompute::kBF16 ? ceiling.bf16_flop : ceiling.f32_flop);
  if (c.kind == ModelKind::kOriginal) return;
  state.counters["bases/token"] = mean_of(load.bases);
  state.counters["replaced/token"] = mean_of(load.replaced);
  for (size_t n = 0; n < load.bases.size(); ++n) {
    if (load.bases[n] > 0) state.counters[fmt::format("tokens_bases={}", n)] = load.bases[n];
    if (load.replaced[n] > 0) state.counters[fmt::format("tokens_replaced={}", n)] = load.replaced[n];
  }
}

void add_case(const LayerCase& c, const char* suffix) {
  const std::string name =
      fmt::format("layer/{}/{}/bf16/{}/{}/{}{}", c.shape, kNames[static_cast<int>(c.kind)],
                  kRoutingNames[static_cast<int>(c.routing)], c.tokens, c.backward ? "backward" : "forward", suffix);
  benchmark::RegisterBenchmark(name.c_str(), [c](benchmark::State& s) { run_layer(s, c); })
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

const bool registered = bench::registered([] {
  for (const char* const shape : {"tiny", "olmoe-1b-7b"}) {
    for (const ModelKind kind : {ModelKind::kOriginal, ModelKind::kLightMoe30, ModelKind::kLightMoe40,
                                 ModelKind::kLightMoe50, ModelKind::kRecovery}) {
      for (const RoutingKind routing : {RoutingKind::kUniform, RoutingKind::kSkewed, RoutingKind::kOne}) {
        for (const int64_t tokens : token_counts("1,8,64,4096,32768")) {
          for (const bool backward : {false, true}) {
            LayerCase c{shape, kind, DType::kBF16, routing, tokens, backward};
            add_case(c, "");
            if ((kind != ModelKind::kLightMoe50 && kind != ModelKind::kRecovery) || routing == RoutingKind::kOne)
              continue;
            c.execution = {.base_once = false};
            add_case(c, "/per_slot");
            c.execution = {.fused = MoeFusion::kOff};
            add_case(c, "/steps");
          }
        }
      }
    }
  }
});

}  // namespace
}  // namespace lightmoe::bench
